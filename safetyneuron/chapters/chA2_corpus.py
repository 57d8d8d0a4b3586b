"""Chapter A2, Table 5: how many prompts detection needs."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from safetyneuron.book import paper as reported
from safetyneuron.book.claims import margin_of
from safetyneuron.book.ledger import glue_findings, name_runs
from safetyneuron.importance.selection import select_fraction
from safetyneuron.metrics.estimates import estimate_exact
from safetyneuron.metrics.verdict import Evidence


def corpus_counts(profile, shares, reference, numbers=()):
    """Neurons at or above ε for each corpus size, with ε set so that `share` of all neurons remain at `reference` prompts, or so many.

    Neurons of equal importance, as the three of a feed-forward channel, are counted or left together.

    Returns a data frame: one row per share and then per number, one column per corpus size.
    """
    rows, minimum = {}, profile.prefix[reference]
    total = sum(values.numel() for values in minimum.values())
    ways = [(f"{100 * share:.1f} %", share) for share in shares]
    for way, share in ways + [(f"{number} neurons", number / total) for number in numbers]:
        inside = select_fraction(minimum, share)
        epsilon = min(minimum[p][mask].min() for p, mask in inside.masks.items() if mask.any())
        rows[f"{way} (ε = {epsilon:.3g})"] = {
            size: sum(int((values >= epsilon).sum()) for values in prefix.values())
            for size, prefix in profile.prefix.items()
        }
    return pd.DataFrame(rows).T


def table_5(counts, model):
    """Paper's Table 5 above the counts of `corpus_counts` of a model."""
    printed = reported.table(5).set_index("column")["value"]
    paper = pd.DataFrame(
        [{size: f"{printed.get(str(size), float('nan')):.0f}" for size in counts.columns}],
        index=["paper: Llama3-8B-Instruct"],
    )
    here = counts.map("{:.0f}".format).rename(index="here: {}".format)
    table = pd.concat([paper, here]).rename_axis("corpus size")
    cells = [
        (size, way, here.loc[f"here: {way}", size])
        for way in counts.index
        for size in counts.columns
    ]
    table.attrs["cells"] = [
        {
            "table": 5,
            "row": "Number of Safety Neurons",
            "column": str(size),
            "model": model,
            "way": way,
            "text": text,
        }
        for size, way, text in cells
    ]
    return table


def corpus_curve(counts, reported):
    """Number of safety neurons relative to that at the paper's 200 documents, against corpus size, log-log.

    counts: data frame as from `corpus_counts`; reported: the paper's counts, size to number.
    """
    _, axes = plt.subplots()
    for name, row in counts.iterrows():
        axes.plot(row.index, row / row[200], marker="o", markersize=3, label=f"here, {name}")
    axes.plot(
        list(reported),
        [n / reported[200] for n in reported.values()],
        "k--",
        marker="s",
        markersize=3,
        label="paper",
    )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="harmful prompts",
        ylabel="neurons, relative to 200 prompts",
    )
    axes.set_xticks(list(counts.columns), [f"{size}" for size in counts.columns])
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.legend(fontsize=8)
    return axes


def lost_beyond(profile, share, reference):
    """Share of the neurons at `reference` prompts that the largest corpus takes away, at the threshold that leaves `share` of all."""
    counts = corpus_counts(profile, [share], reference).iloc[0]
    return 1 - counts[max(counts.index)] / counts[reference]


def glue_corpus(losses, model):
    """Glue the chapter's finding. losses: name of the training to share lost."""
    lost = 100 * np.array(list(losses.values()))
    key, effect = "corpus-suffices", estimate_exact(0.1 - lost / 100)
    glue_findings(
        {key: {model: Evidence(effect, margin_of(key))}},
        {key: f"{lost.min():.0f} to {lost.max():.0f} % are lost beyond 200"},
        name_runs({model: list(losses)}),
    )
