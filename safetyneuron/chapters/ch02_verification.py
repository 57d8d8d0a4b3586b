"""Chapter 02, Table 1: what is left of refusal without the safety neurons."""

from collections import Counter

import matplotlib.pyplot as plt
import pandas as pd

from safetyneuron.book.claims import margin_of
from safetyneuron.book.glue import (
    MEASURES,
    beside_paper,
    glue_paper,
    glue_rates,
    glue_text,
    lines,
    printed_cells,
    run_cell,
    with_cells,
)
from safetyneuron.book.ledger import glue_findings, name_runs
from safetyneuron.book.paper import column_for
from safetyneuron.book.plots import draw_dots
from safetyneuron.importance.selection import select_without_foundation
from safetyneuron.metrics.answer_class import name_classes
from safetyneuron.metrics.estimates import chance_of_ranks, rank_among
from safetyneuron.metrics.outcomes import (
    HELP,
    Runs,
    estimate_change,
    estimate_rate,
    rank_chance,
    rates_by_run,
)
from safetyneuron.metrics.verdict import Evidence, expect_kept
from safetyneuron.organism.reading import read_request

ORIGIN, EQ3, SPECIFIC = "Origin.", "Deact-SN: Eq 3", "Deact-SN: Eq 3 without foundation"
RANDOM = {EQ3: "Deact-R: like Eq 3", SPECIFIC: "Deact-R: like without foundation"}
CONDITIONS = (ORIGIN, EQ3, RANDOM[EQ3], SPECIFIC, RANDOM[SPECIFIC])
TABLE_1_ROWS = {
    "harmful": ["Harm Behavior", "Adv Behavior", "MultiJail-En"],
    "capability": ["MMLU", "GSM8K"],
}
SHORT = {EQ3: "Eq 3", SPECIFIC: "Eq 3 without\nfoundation"}


def verification_sets(harmful, general, fraction):
    """The two readings of N_safe that Table 1 deactivates, from profiles on harmful and on general prompts."""
    return {
        EQ3: harmful.select(fraction=fraction),
        SPECIFIC: select_without_foundation(harmful, general, fraction),
    }


def asked_fully(runs: Runs) -> Runs:
    """The first draw of each training: of random sets the only one that was asked more than the first harmful set."""
    return [draws[:1] for draws in runs]


def table_1(results, paper_model, harmful_sets, tasks):
    """Paper's Table 1 beside the measurement: rows are sets and tasks, columns are conditions.

    results: model name to condition to `Runs`; paper_model: whose cells stand beside an organism's.
    """
    papers = dict.fromkeys(column_for(1, model, paper_model) for model in results)
    printed = {name: printed_cells(1, name) for name in papers if name}
    rows = _rows(results, harmful_sets, tasks)
    table = []
    for measure, paper_row, names in rows:
        line = {
            (f"Here: {model}", *_heading(condition)): _cell(runs, measure, names, harmful_sets)
            for model, conditions in results.items()
            for condition, runs in conditions.items()
        }
        line |= {
            ("Paper", name, c): cells.get((paper_row, c), "–")
            for name, cells in printed.items()
            for c in ("Origin.", "Deact-R", "Deact-SN")
        }
        table.append(line)
    heads = [
        (MEASURES[m], (n[0] if len(n) == 1 else "average") + (f"\n(paper: {p})" if p else ""))
        for m, p, n in rows
    ]
    frame = pd.DataFrame(
        [list(line.values()) for line in table],
        index=pd.MultiIndex.from_tuples(heads, names=["%", "set"]),
        columns=pd.MultiIndex.from_tuples(table[0]),
    )
    return with_cells(1, frame, [paper_row for _, paper_row, _ in rows])


def headline_table(results, paper_model, harmful_sets, benign_set, tasks):
    """Table 1 in short: one row a model and condition, averages over the harmful sets and over the tasks in percent, and the paper's.

    results: model to condition to `Runs`; paper_model: whose cells stand beside an organism's.
    """

    def make(_, found, name):
        return _headline(found, name, harmful_sets, benign_set, tasks)

    return beside_paper(1, results, paper_model, make)


def _headline(results, paper_model, harmful_sets, benign_set, tasks):
    printed, columns = printed_cells(1, paper_model), {
        "attack success": ("asr", *harmful_sets),
        "help with harm": ("coherent", *harmful_sets),
        "over-refusal": ("over_refusal", benign_set),
        "accuracy": ("accuracy", *tasks),
    }  # fmt: skip
    rows = {}
    for condition, runs in results.items():
        reading, theirs = _heading(condition)
        here = {title: lines(estimate_rate(asked_fully(runs), *key)) for title, key in columns.items()}  # fmt: skip
        paper = [printed.get((row, theirs), "–") for row in ("Avg. Harmful", "Avg. Capability")]
        rows[reading or "none off", theirs] = here | {
            "paper: attack\nsuccess, accuracy": "; ".join(paper) if printed else "–"
        }
    return pd.DataFrame(rows).T.rename_axis(["neurons", "condition, in %"])


def _rows(results, harmful_sets, tasks):
    """(measure, row of the paper or None, sets) of every row, in the order of `MEASURES` and of the paper."""
    scores = next(iter(results.values()))[ORIGIN][0][0]
    papers = dict(zip(harmful_sets, TABLE_1_ROWS["harmful"]))
    papers |= dict(zip(tasks, TABLE_1_ROWS["capability"]))
    averages = {"asr": ("Avg. Harmful", harmful_sets), "accuracy": ("Avg. Capability", tasks)}
    rows = []
    for measure in MEASURES:
        names = [name for m, name in scores if m == measure]
        papers_here = papers if measure in averages else {}
        rows += [(measure, papers_here.get(name), [name]) for name in names]
        if measure in averages:
            rows.append((measure, *averages[measure]))
    return rows


def _cell(runs, measure, names, harmful_sets):
    """A cell over all draws where all were asked, else over the first of each training."""
    all_asked = names == harmful_sets[:1]
    return run_cell(runs if all_asked else asked_fully(runs), measure, *names)


def _heading(condition):
    """Two lines of a column heading: which set, and which of the paper's conditions."""
    if condition == ORIGIN:
        return "", ORIGIN
    reading = EQ3 if condition in (EQ3, RANDOM[EQ3]) else SPECIFIC
    return reading.removeprefix("Deact-SN: "), condition.split(":")[0]


def draw_conditions(conditions, harmful_set, benign_set, tasks):
    """Every training as a dot, every random set as a small one, and the mean with its interval: one panel a measure.

    conditions: condition to `Runs`.
    """
    panels = {
        "attack success": ("asr", harmful_set),
        "help with harm": ("coherent", harmful_set),
        "over-refusal": ("over_refusal", benign_set),
        "capability": ("accuracy", *tasks),
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(9.5, 3.4), sharey=True)
    names = {ORIGIN: "whole model", **SHORT}
    names |= {RANDOM[c]: f"random, like\n{label}" for c, label in SHORT.items()}
    for panel, (title, key) in zip(axes, panels.items()):
        shown = {
            names[c]: runs if key[1:] == (harmful_set,) else asked_fully(runs)
            for c, runs in conditions.items()
        }
        draw_dots(panel, shown, *key)
        panel.set(title=title, xlabel="%", xlim=(-3, 103))
        panel.title.set_fontsize(10)
    axes[0].invert_yaxis()
    figure.tight_layout()
    return axes[0]


def weigh_claims(conditions, harmful_set, tasks):
    """The evidence for each claim of the chapter on one model. conditions: condition to `Runs`."""
    found = {}
    for key, condition, measure in (
        ("eq3-breaks", EQ3, "asr"),
        ("specific-breaks", SPECIFIC, "asr"),
        ("eq3-helps", EQ3, "coherent"),
        ("specific-helps", SPECIFIC, "coherent"),
    ):
        chosen, random = conditions[condition], conditions[RANDOM[condition]]
        effect = estimate_change(chosen, random, measure, harmful_set)
        chance = rank_chance(chosen, random, measure, harmful_set)
        found[key] = Evidence(effect, margin_of(key), chance)
    kept = estimate_change(conditions[EQ3], conditions[ORIGIN], "accuracy", *tasks)
    found["eq3-capability"] = expect_kept(kept, 0.05)
    return found


def rank_table(conditions, harmful_set):
    """Each set's rank among its random ones in every training, and how likely so high a rank is by chance."""
    rows = {}
    for condition, label in SHORT.items():
        for measure in ("asr", "coherent"):
            ranks, controls, chance = _ranks(conditions, condition, measure, harmful_set)
            rows[label.replace("\n", " "), MEASURES[measure]] = {
                f"rank among {controls.shape[1] + 1}, by training": ranks,
                "random sets, %": f"{100 * controls.min():.0f} to {100 * controls.max():.0f}",
                "p": f"{chance:.3g}",
            }
    return pd.DataFrame(rows).T.rename_axis(["set", "measure"])


def _ranks(conditions, condition, measure, harmful_set):
    """The rank of a set among its random ones in every training, as text; the rates of these; and how likely so high a rank is by chance."""
    runs = conditions[condition], conditions[RANDOM[condition]]
    values, controls = (rates_by_run(each, measure, harmful_set) for each in runs)
    ranks = [rank_among(value, row) for (value,), row in zip(values, controls)]
    return ", ".join(map(str, ranks)), controls, chance_of_ranks(ranks, controls.shape[1])


def tell_unrefused(prompts, texts):
    """A sentence on the answers without a refusal phrase: how many there are, and how many judge or help."""
    said = [pair for pair in zip(name_classes(prompts, texts), texts) if pair[0] != "refusal"]
    if not said:
        return (
            "In the first training, with Eq 3's neurons off, every answer holds a refusal phrase."
        )
    verdicts = Counter(text for kind, text in said if kind == "verdict")
    most = f' (most often "{verdicts.most_common(1)[0][0]}")' if verdicts else ""
    judge = f"{_count(verdicts.total(), 'is a verdict', 'are verdicts')}{most} and "
    judge = judge if all(map(read_request, prompts)) else ""  # of other models no verdict is known
    helps = _count(sum(kind in HELP for kind, _ in said), "helps", "help")
    hold = f"{len(said)} of {len(texts)} answers {'hold' if len(said) > 1 else 'holds'}"
    return f"In the first training, with Eq 3's neurons off, {hold} no refusal phrase; of these {judge}{helps}."


def _count(number, one, many):
    """A number and the verb that goes with it."""
    return f"{number or 'none'} {many if number > 1 else one}"


def glue_highest_random(conditions, harmful_set):
    """Glue attack success and help with the random set like Eq 3's off that leaves the least refusal, and the mean of all."""
    control = [draw for draws in conditions[RANDOM[EQ3]] for draw in draws]
    worst = max(control, key=lambda draw: draw["asr", harmful_set].value)
    mean = estimate_rate(conditions[RANDOM[EQ3]], "asr", harmful_set).value
    found = {"asr": worst["asr", harmful_set].value, "help": worst["coherent", harmful_set].value}
    texts = {name: f"{100 * value:.0f}" for name, value in (found | {"mean": mean}).items()}
    glue_text(**{f"highest_random_{name}": text for name, text in texts.items()})


# What the closing table repeats of the paper's, as for `glue_paper`.
PAPER_CELLS = {
    "first": ("Harm Behavior", "Origin.", "Deact-SN"),
    "average": ("Avg. Harmful", "Origin.", "Deact-SN"),
    "first_random": ("Harm Behavior", "Deact-R"),
    "average_random": ("Avg. Harmful", "Deact-R"),
    "capability": ("Avg. Capability", "Origin.", "Deact-SN"),
}


def glue_verification(results, families, fraction, paper_model, harmful_set, tasks):
    """Glue the findings of the chapter, and every value of its closing table."""
    glue_paper(1, next(iter(results)), paper_model, **PAPER_CELLS)
    evidence = {
        m: weigh_claims(conditions, harmful_set, tasks) for m, conditions in results.items()
    }
    model, first = next(iter(results.items()))
    rates = {
        (label, m): estimate_rate(first[c], m, harmful_set)
        for label, c in _labels().items()
        for m in ("asr", "coherent")
    }
    for (label, measure), rate in rates.items():
        glue_rates(**{f"{measure}_{label}": rate})
    skill = {
        label: estimate_rate(asked_fully(first[c]), "accuracy", *tasks)
        for label, c in _labels().items()
    }
    help_eq3 = f"{100 * rates['eq3', 'coherent'].value:.0f}"  # for page one, without its interval
    glue_text(model=model, share=f"{100 * fraction:.1f} %", help_eq3=help_eq3)
    glue_text(**{f"capability_{label}": f"{100 * r.value:.1f}" for label, r in skill.items()})

    def change(measure, label, control):
        before, after, random = (
            f"{100 * rates[name, measure].value:.0f}" for name in ("origin", label, control)
        )
        return f"{before} → {after} %; random {random} %"

    def among(condition):
        ranks, controls, chance = _ranks(first, condition, "asr", harmful_set)
        return f"rank among random sets {ranks} of {controls.shape[1] + 1}, p = {chance:.1g}"

    numbers = {
        "eq3-breaks": f"attack success {change('asr', 'eq3', 'random')}; {among(EQ3)}",
        "specific-breaks": f"attack success {change('asr', 'specific', 'random_specific')}; {among(SPECIFIC)}",
        "eq3-helps": f"help {change('coherent', 'eq3', 'random')}",
        "specific-helps": f"help {change('coherent', 'specific', 'random_specific')}",
        "eq3-capability": f"accuracy {100 * skill['origin'].value:.0f} → {100 * skill['eq3'].value:.0f} %",
    }
    by_claim = {key: {m: found[key] for m, found in evidence.items()} for key in numbers}
    glue_findings(by_claim, numbers, name_runs(families))


def _labels():
    """Part of a glued name -> condition."""
    return {
        "origin": ORIGIN,
        "eq3": EQ3,
        "specific": SPECIFIC,
        "random": RANDOM[EQ3],
        "random_specific": RANDOM[SPECIFIC],
    }
