"""Chapter 01: how importance falls, and where the selected neurons lie."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from safetyneuron.book.claims import margin_of
from safetyneuron.book.ledger import glue_findings, name_runs
from safetyneuron.metrics.estimates import estimate_exact
from safetyneuron.metrics.verdict import Evidence
from safetyneuron.neurons.architecture import ATTENTION, PROJECTIONS


def survival_curve(profile):
    """Share of neurons whose minimum importance is at least ε, one line for all projections with the same curve."""
    curves = {}
    for projection in PROJECTIONS:
        values = profile.minimum[projection].flatten().sort().values
        same = tuple(f"{value:.3g}" for value in values.tolist())
        curves.setdefault(same, (values, []))[1].append(projection)
    _, axes = plt.subplots()
    for row, (values, names) in enumerate(curves.values()):
        left = 100 * (1 - np.arange(len(values)) / len(values))
        (line,) = axes.plot(values, left, label=", ".join(names))
        # The ends lie close together, so the names step down below them.
        below = dict(xytext=(-2, -2 - 8 * (row % 3)), textcoords="offset points", va="top")
        look = dict(color=line.get_color(), fontsize=8)
        axes.annotate(line.get_label(), (values[-1], left[-1]), **below, **look)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="threshold ε (change of the sub-block's output)",
        ylabel="neurons with minimum ≥ ε (%)",
    )
    axes.set_ylim(bottom=axes.get_ylim()[0] / 3)  # room for the names
    return axes


def tell_attention(neurons):
    """Whether most of a set lies in attention, as the paper says, in both counts: a sentence."""
    held = {
        count: neurons.share_in(ATTENTION, units=units) > 0.5
        for count, units in (("neurons", False), ("functional units", True))
    }
    by = [count for count, most in held.items() if most]
    if len(by) == 1:
        return f'The paper\'s "predominantly in self-attention" holds for this training if {by[0]} are counted, and not otherwise.'
    said = ("holds", "both counts") if by else ("does not hold", "either count")
    return 'The paper\'s "predominantly in self-attention" {} for this training, by {}.'.format(
        *said
    )


def counts_heatmap(neurons):
    """Share of each layer's rows in the set, layer against projection, in percent."""
    shares = {p: 100 * mask.float().mean(1).numpy() for p, mask in neurons.masks.items()}
    axes = sns.heatmap(
        pd.DataFrame(shares).T.rename(columns=lambda layer: layer + 1),
        annot=True,
        fmt=".1f",
        cmap="viridis",
        cbar_kws={"label": "% of the rows"},
    )
    axes.set(xlabel="layer", ylabel="projection")
    axes.set_yticklabels(axes.get_yticklabels(), rotation=0)
    return axes


def glue_overlap(overlaps):
    """Glue the chapter's finding. overlaps: name of the training to share."""
    effect = estimate_exact(0.5 - np.array(list(overlaps.values())))
    model, key = next(iter(overlaps)), "apart-from-foundation"
    low, high = (100 * end(overlaps.values()) for end in (min, max))
    number = f"{low:.0f} to {high:.0f} % are shared"
    glue_findings(
        {key: {model: Evidence(effect, margin_of(key))}},
        {key: number},
        name_runs({model: list(overlaps)}),
    )
