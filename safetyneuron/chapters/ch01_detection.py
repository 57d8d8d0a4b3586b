"""Chapter 01: how importance falls, and where the selected neurons lie."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from safetyneuron.book.claims import margin_of
from safetyneuron.book.ledger import glue_findings, name_runs
from safetyneuron.metrics.estimates import estimate_exact
from safetyneuron.metrics.verdict import Evidence
from safetyneuron.neurons.architecture import PROJECTIONS


def survival_curve(profile):
    """Share of neurons whose minimum importance is at least ε, one line for all projections with the same curve."""
    curves = {}
    for projection in PROJECTIONS:
        values = profile.minimum[projection].flatten().sort().values
        same = tuple(f"{value:.3g}" for value in values.tolist())
        curves.setdefault(same, (values, []))[1].append(projection)
    _, axes = plt.subplots()
    for values, names in curves.values():
        left = 1 - np.arange(len(values)) / len(values)
        axes.plot(values, 100 * left, label=", ".join(names))
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="threshold ε (change of the sub-block's output)",
        ylabel="neurons with minimum ≥ ε (%)",
    )
    axes.legend(title="projection", frameon=False)
    return axes


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


def overlaps_table(overlaps, fraction):
    """Share of N_safe that is selected on ordinary requests too, a column a training. overlaps: name of the training to share."""
    shares = {name.removeprefix("organism/"): f"{share:.0%}" for name, share in overlaps.items()}
    return pd.DataFrame([shares], index=[f"shared, of {fraction:.1%} of the neurons"])


def glue_overlap(overlaps):
    """Glue the chapter's finding. overlaps: name of the training to share."""
    effect = estimate_exact(0.5 - np.array(list(overlaps.values())))
    model, key = next(iter(overlaps)), "apart-from-foundation"
    number = f"{min(overlaps.values()):.0%} to {max(overlaps.values()):.0%} are shared"
    glue_findings(
        {key: {model: Evidence(effect, margin_of(key))}},
        {key: number},
        name_runs({model: list(overlaps)}),
    )
