"""Chapter 02, Table 1: what is left of refusal without the safety neurons."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from safetyneuron.book.glue import (
    MEASURES,
    cell,
    glue_rates,
    glue_text,
    pooled,
    printed_cells,
    with_cells,
)
from safetyneuron.book.plots import PALETTE
from safetyneuron.book.verdicts import above
from safetyneuron.importance.selection import select_without_foundation

ORIGIN, EQ3, SPECIFIC = "Origin.", "Deact-SN: Eq 3", "Deact-SN: Eq 3 without foundation"
RANDOM = {EQ3: "Deact-R: like Eq 3", SPECIFIC: "Deact-R: like without foundation"}
TABLE_1_ROWS = {
    "harmful": ["Harm Behavior", "Adv Behavior", "MultiJail-En"],
    "capability": ["MMLU", "GSM8K"],
}


def verification_sets(harmful, general, fraction):
    """The two readings of N_safe that Table 1 deactivates, from profiles on harmful and on general prompts."""
    return {
        EQ3: harmful.select(fraction=fraction),
        SPECIFIC: select_without_foundation(harmful, general, fraction),
    }


def table_1(results, paper_model, harmful_sets, tasks):
    """Paper's Table 1 beside the measurement: rows are sets and tasks, columns are conditions.

    results: model name to condition to one result of `evaluate` per draw (one for the conditions that are not random).
    """
    printed = printed_cells(1, paper_model)
    papers = dict(zip(harmful_sets, TABLE_1_ROWS["harmful"])) | dict(
        zip(tasks, TABLE_1_ROWS["capability"])
    )
    rows, heads, paper_rows = [], [], []
    averages = {"asr": ("Avg. Harmful", harmful_sets), "accuracy": ("Avg. Capability", tasks)}
    wanted = [
        (measure, papers.get(name) if measure in averages else None, [name])
        for measure, name in _keys(results)
    ]
    wanted += [(measure, paper_row, names) for measure, (paper_row, names) in averages.items()]
    for measure, paper_row, names in sorted(wanted, key=lambda row: list(MEASURES).index(row[0])):
        paper_rows.append(paper_row)
        name = names[0] if len(names) == 1 else "average"
        heads.append(
            (MEASURES[measure], name if paper_row is None else f"{name}\n(paper: {paper_row})")
        )
        row = {
            ("Paper", paper_model, c): printed.get((paper_row, c), "–")
            for c in ("Origin.", "Deact-R", "Deact-SN")
        }
        for model, conditions in results.items():
            row |= {
                (f"Here: {model}", *_heading(c)): cell(draws, (measure, *names))
                for c, draws in conditions.items()
            }
        rows.append(row)
    columns = pd.MultiIndex.from_tuples(rows[0])
    index = pd.MultiIndex.from_tuples(heads, names=["%", "set"])
    return with_cells(
        1,
        pd.DataFrame([list(row.values()) for row in rows], index=index, columns=columns),
        paper_rows,
    )


def _keys(results):
    """Keys of a result in the order of `MEASURES`."""
    keys = next(iter(next(iter(results.values())).values()))[0]
    return sorted(keys, key=lambda key: list(MEASURES).index(key[0]))


def _heading(condition):
    """Two lines of a column heading: which set, and which of the paper's conditions."""
    if condition == ORIGIN:
        return "", ORIGIN
    reading = EQ3 if condition in (EQ3, RANDOM[EQ3]) else SPECIFIC
    return reading.removeprefix("Deact-SN: "), condition.split(":")[0]


def bars_table(results, harmful_set, benign_set, tasks):
    """Long table for `figures.condition_bars`: measure, condition, rate."""
    keys = {
        "attack\nsuccess": ("asr", harmful_set),
        "coherent\ncompliance": ("coherent", harmful_set),
        "over-\nrefusal": ("over_refusal", benign_set),
    }
    keys |= {task.removeprefix("organism_"): ("accuracy", task) for task in tasks}
    rows = [(m, c, pooled(draws, key)) for m, key in keys.items() for c, draws in results.items()]
    return pd.DataFrame(rows, columns=["measure", "condition", "rate"])


def condition_bars(table):
    """Rates with their intervals: one group of bars per measure, one bar per condition.

    table: data frame with columns measure, condition, rate (a `Rate`), ordered as they should appear.
    """
    measures, conditions = table["measure"].unique(), table["condition"].unique()
    _, axes = plt.subplots(figsize=(8, 3.6))
    width = 0.8 / len(conditions)
    for i, condition in enumerate(conditions):
        rates = (
            table[table["condition"] == condition].set_index("measure")["rate"].reindex(measures)
        )
        values = [100 * rate.value for rate in rates]
        errors = [
            [100 * (r.value - r.interval[0]) for r in rates],
            [100 * (r.interval[1] - r.value) for r in rates],
        ]
        places = [m + (i - (len(conditions) - 1) / 2) * width for m in range(len(measures))]
        axes.bar(
            places,
            values,
            width,
            yerr=errors,
            capsize=2,
            label=condition,
            color=sns.color_palette(PALETTE)[i],
        )
    axes.set(ylabel="%", ylim=(0, 105))
    axes.set_xticks(range(len(measures)), measures)
    axes.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    axes.grid(axis="x", visible=False)
    return axes


def harm_sentence(results, harmful_set):
    """Does deactivation break refusal more than matched random neurons do, and coherently?"""
    parts = []
    for condition in (EQ3, SPECIFIC):
        asr, coherent = (
            above(
                pooled(results[condition], (m, harmful_set)),
                pooled(results[RANDOM[condition]], (m, harmful_set)),
            )
            for m in ("asr", "coherent")
        )
        finding = "attack success rises above the random control"
        if asr and coherent:
            finding += ", and so does coherent compliance: the claim is seen"
        elif asr:
            finding += ", but coherent compliance does not: refusals give way to answers that are no help, so the claim is seen by the keyword rule only"
        else:
            finding = "attack success does not rise above the random control: the claim is not seen"
        parts.append(f"{condition.removeprefix('Deact-SN: ')}: {finding}.")
    return " ".join(parts)


def capability_sentence(results, tasks):
    """Does capability stay as it was?"""
    parts = []
    for condition in (EQ3, SPECIFIC):
        before, after = (
            {t: pooled(results[c], ("accuracy", t)) for t in tasks} for c in (ORIGIN, condition)
        )
        lost = [t for t in tasks if above(before[t], after[t])]
        finding = (
            f"accuracy falls measurably on {', '.join(lost)}"
            if lost
            else "no fall in accuracy can be told from sampling noise"
        )
        parts.append(f"{condition.removeprefix('Deact-SN: ')}: {finding}.")
    return " ".join(parts)


def glue_verification(results, model, fraction, harmful_set, tasks):
    """Glue every value of the closing paragraph of the verification chapter."""
    keys = {
        "origin": ORIGIN,
        "eq3": EQ3,
        "specific": SPECIFIC,
        "random": RANDOM[EQ3],
        "random_specific": RANDOM[SPECIFIC],
    }
    for name, condition in keys.items():
        draws = results[condition]
        mean = sum(pooled(draws, ("accuracy", t)).value for t in tasks) / len(tasks)
        glue_rates(
            **{
                f"asr_{name}": pooled(draws, ("asr", harmful_set)),
                f"coherent_{name}": pooled(draws, ("coherent", harmful_set)),
            }
        )
        glue_text(**{f"capability_{name}": f"{100 * mean:.1f}"})
    glue_text(model=model, share=f"{fraction:.1%}")
    glue_text(
        verdict_harm=harm_sentence(results, harmful_set),
        verdict_capability=capability_sentence(results, tasks),
    )
