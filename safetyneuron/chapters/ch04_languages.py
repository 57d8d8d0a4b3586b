"""Chapter 04, Figure 5: safety neurons of several languages."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from safetyneuron.book import labels
from safetyneuron.book import paper as reported
from safetyneuron.book.glue import glue_text
from safetyneuron.book.verdicts import WAYS, above
from safetyneuron.metrics.suite import evaluate


def overlap(sets):
    """|N_x ∩ N_y| / |N_y| for every two sets: rows x, columns y (Figure 5)."""
    return pd.DataFrame(
        {y: {x: len(a & b) / len(b) for x, a in sets.items()} for y, b in sets.items()}
    ).rename_axis("x")


def off_diagonal(matrix):
    """Mean of a square data frame without its diagonal."""
    values = matrix.to_numpy()
    return (values.sum() - values.trace()) / (values.size - len(values))


def across_languages(model, tokenizer, suites, sets):
    """Attack success in each language with the neurons of each language deactivated.

    Parameters
    ----------
    suites : dict of str to Suite
        Requests per language.
    sets : dict of str to NeuronSet
        Neurons per language.

    Returns
    -------
    pandas.DataFrame
        Rows none and the language deactivated, columns the language asked; cells are `Rate`.
    """
    rows = {"none": None} | sets
    cells = {
        asked: {off: _asr(model, tokenizer, suite, neurons) for off, neurons in rows.items()}
        for asked, suite in suites.items()
    }
    return pd.DataFrame(cells).rename_axis("deactivated")


def _asr(model, tokenizer, suite, neurons):
    return next(
        rate
        for (measure, _), rate in evaluate(model, tokenizer, suite, without=neurons).items()
        if measure == "asr"
    )


def overlap_heatmaps(matrices):
    """Overlap |N_x ∩ N_y| / |N_y| in percent, one panel per way of choosing sets, on one scale. matrices: title to data frame."""
    figure, panels = plt.subplots(
        1, len(matrices), figsize=(3.4 * len(matrices), 3.2), sharey=True, squeeze=False
    )
    for axes, (title, matrix) in zip(panels[0], matrices.items()):
        sns.heatmap(
            100 * matrix,
            annot=True,
            fmt=".0f",
            vmin=0,
            vmax=100,
            cmap="viridis",
            square=True,
            cbar=False,
            ax=axes,
        )
        axes.set(title=title, xlabel="y", ylabel="x")
        axes.title.set_fontsize(10)
    figure.tight_layout()
    return panels[0, 0]


def rates_heatmap(table, xlabel, ylabel):
    """A data frame of `Rate` cells as a heat map in percent."""
    _, axes = plt.subplots(figsize=(5.5, 3.6))
    sns.heatmap(
        100 * table.map(lambda r: r.value),
        annot=True,
        fmt=".0f",
        vmin=0,
        vmax=100,
        cmap="viridis",
        ax=axes,
        cbar_kws={"label": "%"},
    )
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_yticklabels(axes.get_yticklabels(), rotation=0)
    return axes


def glue_languages(matrices, random, rates):
    """Glue overlap of languages, its references, and whether a language's neurons hit their own language most.

    matrices: name to overlap matrix; random: expected overlap of random sets; rates: `mechanism.across_languages`.
    """
    means = {name: off_diagonal(matrix) for name, matrix in matrices.items()}
    texts = [f"{name}: {100 * mean:.0f} %" for name, mean in means.items()]
    seen = [
        f"{'seen' if 100 * means[n] < reported.OVERLAP_BELOW else 'not seen'} for {n}"
        for n in (labels.EQ3, labels.SPECIFIC)
    ]
    glue_text(verdict_overlap=f"Mean overlap of two languages is {', '.join(texts)}; random sets of that size share {100 * random:.1f} %. "
              f"An overlap below {reported.OVERLAP_BELOW} % is {' and '.join(seen)}.")  # fmt: skip
    glue_text(
        overlap_random=f"{random:.0%}",
        **{f"overlap_{label}": f"{means[name]:.0%}" for label, name in WAYS.items()},
    )
    rise = {
        on: {off: rates.loc[off, on].value - rates.loc["none", on].value for off in rates.index[1:]}
        for on in rates.columns
    }
    own = [on for on in rates.columns if above(rates.loc[on, on], rates.loc["none", on])]
    most = [on for on in own if max(rise[on], key=rise[on].get) == on]
    others = [
        f"{off} on {on}"
        for on in rates.columns
        for off in rates.index[1:]
        if off != on and above(rates.loc[off, on], rates.loc["none", on])
    ]
    glue_text(
        own_languages=f"{len(own)} of {len(rates.columns)}",
        other_languages=f"{len(others)} of {len(rates.columns) * (len(rates.columns) - 1)}",
    )
    glue_text(verdict_causal=f"A language's own neurons raise its attack success measurably in {len(own)} of {len(rates.columns)} languages"
              f" and more than any other language's in {len(most)}; another language's neurons do in {len(others)} of {len(rates.columns) * (len(rates.columns) - 1)} pairs.")  # fmt: skip
