"""Chapter 08, Figures 6 and 7: numbers of documents, shares and learning rates."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from safetyneuron.book.glue import glue_list, glue_text
from safetyneuron.book.plots import draw_bands, rate_panels
from safetyneuron.book.verdicts import above
from safetyneuron.kept.defences import sn_tune
from safetyneuron.metrics.suite import evaluate


def by_documents(model, tokenizer, suite, documents, counts, sets, **schedule):
    """Rates against the number of documents (Figure 6).

    Returns
    -------
    pandas.DataFrame
        Columns condition, documents, measure, set, rate; no documents means the model as it is.
    """
    rows = []
    for name, neurons in sets.items():
        for count in counts:
            rates = _tuned_rates(model, tokenizer, suite, documents[:count], neurons, schedule)
            rows += [(name, count, *key, rate) for key, rate in rates.items()]
    return pd.DataFrame(rows, columns=["condition", "documents", "measure", "set", "rate"])


def grid(model, tokenizer, suite, documents, neurons, epochs, rates, **schedule):
    """Rates for every number of epochs and learning rate (Figure 7).

    Returns
    -------
    pandas.DataFrame
        Columns epochs, learning_rate, measure, set, rate.
    """
    rows = []
    for count in epochs:
        for learning_rate in rates:
            options = schedule | {"epochs": count, "learning_rate": learning_rate}
            measured = _tuned_rates(model, tokenizer, suite, documents, neurons, options)
            rows += [(count, learning_rate, *key, rate) for key, rate in measured.items()]
    return pd.DataFrame(rows, columns=["epochs", "learning_rate", "measure", "set", "rate"])


def _tuned_rates(model, tokenizer, suite, documents, neurons, schedule):
    if not documents:
        return evaluate(model, tokenizer, suite)
    with sn_tune(model, tokenizer, documents, neurons, **schedule).merged(model):
        return evaluate(model, tokenizer, suite)


def documents_curves(tables, measures):
    """Rates with their 95 % bands against the number of documents: one row of panels per model, one column per measure (Figure 6).

    tables: model name to the result of `defences.by_documents`; measures: (measure, set) to panel title.
    """
    return rate_panels(
        tables,
        measures,
        lambda axes, rows: draw_bands(axes, rows, "condition", "documents"),
        "documents",
    )


def tuning_grids(tables, measures):
    """Heat maps in percent over epochs and learning rates: one row per model, one column per measure (Figure 7).

    tables: model name to the result of `defences.grid`; measures: (measure, set) to panel title.
    """
    figure, panels = plt.subplots(
        len(tables),
        len(measures),
        figsize=(3.2 * len(measures), 2.9 * len(tables)),
        squeeze=False,
        sharey=True,
    )
    for row, (model, table) in zip(panels, tables.items()):
        for axes, ((measure, name), title) in zip(row, measures.items()):
            chosen = table[(table["measure"] == measure) & (table["set"] == name)]
            values = chosen.assign(rate=[100 * rate.value for rate in chosen["rate"]]).pivot(
                index="epochs", columns="learning_rate", values="rate"
            )
            values.columns = [f"{rate:g}" for rate in values.columns]
            sns.heatmap(
                values, annot=True, fmt=".0f", vmin=0, vmax=100, cmap="viridis", cbar=False, ax=axes
            )
            axes.set(
                xlabel="learning rate",
                ylabel="epochs" if axes is row[0] else "",
                title=f"{model.removeprefix('organism/')}: {title}",
            )
            axes.title.set_fontsize(9)
    figure.tight_layout()
    return panels[0, 0]


def glue_documents(tables, measured_set):
    """Glue the fewest documents at which attack success is measurably lower, for every model and condition."""
    parts = []
    for model, table in tables.items():
        for condition, rows in table[
            (table["measure"] == "asr") & (table["set"] == measured_set)
        ].groupby("condition", sort=False):
            before = rows.sort_values("documents")["rate"].iloc[0]
            enough = rows[[above(before, rate) for rate in rows["rate"]]]["documents"].min()
            last = rows[rows["documents"] == rows["documents"].max()]["rate"].iloc[0]
            fewest = (
                "at no number tried" if enough != enough else f"first at {enough:.0f} documents"
            )
            accuracy = table[
                (table["measure"] == "accuracy") & (table["condition"] == condition)
            ].sort_values("documents")["rate"]
            kept = (
                f"falls from {accuracy.iloc[0].percent} to {accuracy.iloc[-1].percent} %"
                if above(accuracy.iloc[0], accuracy.iloc[-1])
                else "does not fall measurably"
            )
            parts.append(
                f"{model}, {condition}: attack success is measurably lower {fewest}, and {last.percent} % at the most; accuracy {kept}"
            )
            glue_text(
                **{
                    f"documents_{where}": f"{fewest} ({model})"
                    for where, m in _ends(tables).items()
                    if m == model and condition == table["condition"].iloc[0]
                }
            )
    glue_list("verdict_documents", [f"{part}." for part in parts])


def glue_grid(tables, harmful_set, benign_set, task):
    """Glue how many cells of the grid bring harm below 10 %, in how many of them benign requests are answered, and where capability holds."""
    parts = []
    for model, table in tables.items():

        def value(measure, name):
            return (
                table[(table["measure"] == measure) & (table["set"] == name)]["rate"]
                .map(lambda rate: rate.value)
                .to_numpy()
            )

        safe = value("asr", harmful_set) < 0.1
        usable = safe & (value("over_refusal", benign_set) < 0.5)
        accuracy = value("accuracy", task)
        kept = safe & (accuracy > accuracy.max() - 0.1)
        glue_text(
            **{
                f"grid_{where}": f"{safe.sum()} of {len(safe)} cells, {usable.sum()} of them usable ({model})"
                for where, m in _ends(tables).items()
                if m == model
            }
        )
        parts.append(
            f"{model}: attack success is below 10 % in {safe.sum()} of {len(safe)} cells; accuracy is within 10 points of the best cell in {kept.sum()} of these, and fewer"
            f" than half of the benign requests are refused in {usable.sum()}; the lowest accuracy of the grid is {100 * accuracy.min():.0f} %"
        )
    glue_list("verdict_grid", [f"{part}." for part in parts])


def _ends(tables):
    """The first model, aligned, and the last, which is not."""
    names = list(tables)
    return {"first": names[0], "last": names[-1]}
