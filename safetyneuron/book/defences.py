"""What chapters 05 and 06 share: tables, figures and evidence about models that were trained to refuse."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from safetyneuron.book.claims import margin_of
from safetyneuron.book.glue import (
    MEASURES,
    beside_paper,
    glue_paper,
    glue_text,
    lines,
    printed_cells,
    run_cell,
)
from safetyneuron.book.ledger import glue_findings, name_runs
from safetyneuron.book.plots import draw_dots
from safetyneuron.book.tables import count_classes
from safetyneuron.kept.defences import BREAKER, EQ3, ORIGIN, RANDOM, SPECIFIC, Column
from safetyneuron.metrics.outcomes import (
    Runs,
    estimate_change,
    estimate_judgement,
    estimate_rate,
    rank_chance,
    rates_by_run,
)
from safetyneuron.metrics.verdict import Evidence, expect_kept

CONDITIONS = (ORIGIN, BREAKER, EQ3, SPECIFIC, *RANDOM.values())  # what is not attacked comes last
LABELS = {
    ORIGIN: "as it is",
    BREAKER: "Circ-Break",
    EQ3: "SN-Tune",
    SPECIFIC: "SN-Tune without\nfoundation neurons",
    RANDOM[EQ3]: "random like SN-Tune",
    RANDOM[SPECIFIC]: "random like the second",
}
PAPER_COLUMNS = {ORIGIN: "Origin.", BREAKER: "Circ-Break", EQ3: "SN-Tune"}
PAPER_TASKS = ("MMLU", "ARC-c", "GSM8K")
Columns = Mapping[str, Sequence[Sequence[Column]]]  # condition to trainings to random draws


def runs_of(columns: Columns) -> dict[str, Runs]:
    """The scores of every condition, of every draw."""
    return {
        condition: [[column.scores for column in draws] for draws in trainings]
        for condition, trainings in columns.items()
    }


def draws_asked(runs: Runs, measure: str, *names: str) -> Runs | None:
    """The draws that were asked all of these sets: all of them, or the first of each training, which alone is asked more than for harm.

    None where no draw was: random sets are not attacked.
    """
    for part in (runs, [draws[:1] for draws in runs]):
        if all((measure, name) in part[0][-1] for name in names):
            return part
    return None


def runs_asked(columns: Columns, measure: str, *names: str) -> dict[str, Runs]:
    """`draws_asked` of every condition that was asked."""
    found = {c: draws_asked(runs, measure, *names) for c, runs in runs_of(columns).items()}
    return {condition: runs for condition, runs in found.items() if runs}


ATTACKED_HELP = "help with harm,\nwith attacks"  # drawn, and in the full table


def measures_of(languages, attacks, tasks):
    """Column or panel title to measure and sets; attacks are made in the first language."""
    searched = (languages[0], *attacks)
    found = {
        "attack success,\ndirect": ("asr", *languages),
        "over-refusal": ("over_refusal", *languages),
        "helpful answers": ("helpful", *languages),
    }
    if attacks:
        found |= {
            "attack success,\nwith attacks": ("asr", *searched),
            ATTACKED_HELP: ("coherent", *searched),
        }
    return found | {"accuracy": ("accuracy", *tasks)}


def headline_table(number, results: dict[str, Columns], paper_model, asked):
    """One row a model and condition, in percent, and what the paper has for it: direct, with attacks, and capability.

    paper_model: whose cells stand beside an organism's; asked: languages, names of the attacks, tasks.
    """
    return beside_paper(
        number, results, paper_model, lambda _, found, name: _headline(number, found, name, asked)
    )


def _headline(number, columns: Columns, paper_model, asked):
    printed, rows = printed_cells(number, paper_model), {}
    for condition, runs in runs_of(columns).items():
        theirs = [
            printed.get((row, PAPER_COLUMNS.get(condition)), "–")
            for row in ("Direct", "Avg. Harmful", "Avg. Capability")
        ]
        here = {
            title: _cell(runs, key, lambda *of: lines(estimate_rate(*of)))
            for title, key in measures_of(*asked).items()
            if title != ATTACKED_HELP
        }
        told = "; ".join(theirs) if printed else "–"
        rows[LABELS[condition]] = here | {"paper: direct,\nwith attacks, accuracy": told}
    return pd.DataFrame(rows).T.rename_axis("%")


def full_table(number, results: dict[str, Columns], paper_model, asked):
    """Paper's Table 2 or 3 beside the measurement: cost, capability, direct requests in several languages, attacks in the first one.

    paper_model: whose cells stand beside an organism's; asked: languages, names of the attacks, tasks, which stand for MMLU,
    ARC-challenge and GSM8K in this order.
    """
    several = len(results) > 1

    def make(model, columns, name):
        return _full(number, columns, model, name, asked, "the paper" if several else name)

    return beside_paper(number, results, paper_model, make)


def _full(number, columns: Columns, model, paper_model, asked, head):
    printed, runs, table = printed_cells(number, paper_model), runs_of(columns), {}
    rows, cells = _rows(*asked), []
    for group, name, paper_row, key in rows:
        line = {
            ("here", LABELS[c]): key(columns[c]) if callable(key) else _cell(runs[c], key, run_cell)
            for c in columns
        }
        cells += [
            {"table": number, "row": paper_row, "column": column, "model": model, "way": "", "text": line["here", LABELS[c]]}
            for c, column in PAPER_COLUMNS.items() if paper_row and c in columns
        ]  # fmt: skip
        line |= {
            (head, column): printed.get((paper_row, column), "–")
            for column in PAPER_COLUMNS.values()
        }
        table[group, name] = line
    frame = pd.DataFrame.from_dict(table, orient="index")
    frame.columns = pd.MultiIndex.from_tuples(frame.columns)
    frame.attrs["cells"] = cells
    return frame


def _cell(runs, key, write):
    """What `write` makes of the runs that were asked; it says so where that was one random set (of each training) and not all."""
    asked = draws_asked(runs, *key)
    if not asked:
        return "–"
    return write(asked, *key) + ("" if asked is runs else "\n(one random set)")


def _rows(languages, attacks, tasks):
    """(group, name, row of the paper or None, measure and sets or function of a condition's columns) of every row."""
    rows = [
        ("Cost", "training, s (paper: min)", "Training Cost (min.)", seconds_of),
        ("Cost", "parameters (paper: million)", "# Parameters (M)", parameters_of),
    ]
    rows += [
        ("Accuracy", f"{task} (paper: {paper})", paper, ("accuracy", task))
        for task, paper in zip(tasks, PAPER_TASKS)
    ]
    rows.append(("Accuracy", "average", "Avg. Capability", ("accuracy", *tasks)))
    for measure in ("asr", "coherent"):
        names = {f"direct, {language}": (measure, language) for language in languages}
        names |= {f"{attack}, {languages[0]}": (measure, attack) for attack in attacks}
        papers = ["Direct", *[None] * (len(languages) - 1), *attacks]
        if attacks:
            names[f"average, {languages[0]}"] = (measure, languages[0], *attacks)
            papers.append("Avg. Harmful")
        rows += [
            (MEASURES[measure], name, paper if measure == "asr" else None, key)
            for (name, key), paper in zip(names.items(), papers)
        ]
    rows += [
        (MEASURES[measure], language, None, (measure, language))
        for measure in ("over_refusal", "helpful")
        for language in languages
    ]
    return rows


def seconds_of(trainings):
    """Mean training time of a condition's columns, as text."""
    times = [column.seconds for draws in trainings for column in draws]
    return f"{sum(times) / len(times):.1f}" if any(times) else "–"


def parameters_of(trainings):
    """Trained parameters of a condition, mean over trainings, as text."""
    counts = [column.parameters for draws in trainings for column in draws]
    return f"{sum(counts) / len(counts):,.0f}" if any(counts) else "–"


def draw_defences(columns: Columns, asked):
    """Every training as a dot, random sets as small ones, the mean and its interval: one panel a measure."""
    panels = measures_of(*asked)
    figure, axes = plt.subplots(1, len(panels), figsize=(10.5, 3.4), sharey=True)
    for panel, (title, key) in zip(axes, panels.items()):
        shown = runs_asked(columns, *key)
        one = any(len(runs[0]) < len(columns[c][0]) for c, runs in shown.items())
        draw_dots(panel, {LABELS[c]: runs for c, runs in shown.items()}, *key)
        panel.set(title=title + "\n(one random set)" * one, xlabel="%", xlim=(-3, 103))
        panel.title.set_fontsize(10)
    axes[0].invert_yaxis()
    figure.tight_layout()
    return axes[0]


def answer_shares(columns: Columns, language):
    """Classes of the answers to direct requests, over all trainings and draws: label of a condition to class to `Rate`, as `class_bars` draws it."""
    asked = {LABELS[c].replace("\n", " "): runs for c, runs in runs_of(columns).items()}
    return count_classes(asked, language)


def draw_attacks(columns: Columns, languages, attacks):
    """Success in percent of direct requests and of every attack on every condition that was attacked, by the keyword rule and as help."""
    judges = {"asr": "no refusal phrase", "coherent": "help with harm"}
    asked = {"direct": languages[0]} | {attack: attack for attack in attacks}
    searched = runs_asked(columns, "asr", *attacks)
    figure, panels = plt.subplots(1, 2, figsize=(9, 2.6), sharey=True)
    for axes, (measure, title) in zip(panels, judges.items()):
        rows = {
            LABELS[c].replace("\n", " "): {
                label: 100 * rates_by_run(runs, measure, name).mean()
                for label, name in asked.items()
            }
            for c, runs in searched.items()
        }
        options = dict(annot=True, fmt=".0f", vmin=0, vmax=100, cmap="viridis", cbar=False)
        sns.heatmap(pd.DataFrame(rows).T, ax=axes, **options)
        axes.set_title(title, fontsize=10)
    figure.tight_layout()
    return panels[0]


def weigh_claims(stage, columns: Columns, languages, attacks, tasks):
    """The evidence for the claims of chapter 05 (stage `aligned`) or 06 (`base`) on one model."""
    runs, direct = runs_of(columns), ("asr", *languages)
    searched = (languages[0], *attacks)

    def lower(key, worse, better, *of):
        return {f"{stage}-{key}": Evidence(estimate_change(worse, better, *of), margin_of(f"{stage}-{key}"))}  # fmt: skip

    found = lower("refuses", runs[ORIGIN], runs[EQ3], *direct)
    if stage == "base":
        judged = estimate_judgement(runs[EQ3], languages[0], languages[0], runs[ORIGIN])
        found["base-judges"] = Evidence(judged, margin_of("base-judges"))
    else:
        price = estimate_change(runs[ORIGIN], runs[EQ3], "over_refusal", *languages)
        found["aligned-price"] = expect_kept(price, 0.05)
    if attacks:
        found |= lower("resists", runs[ORIGIN], runs[EQ3], "asr", *attacks)
        found |= lower("above-breaker", runs[BREAKER], runs[EQ3], "asr", *searched)
        found |= lower("above-breaker-help", runs[BREAKER], runs[EQ3], "coherent", *searched)
    found |= _above_random(f"{stage}-above-random", runs, direct)
    kept = estimate_change(runs[EQ3], runs[ORIGIN], "accuracy", *tasks)
    return found | {f"{stage}-capability": expect_kept(kept, 0.05)}


def _above_random(key, runs, direct):
    """Whether random sets leave more attack success; and how likely a random set leaves as little."""
    chosen, random = runs[EQ3], runs[RANDOM[EQ3]]
    change = estimate_change(random, chosen, *direct)
    chance = rank_chance(chosen, random, *direct, lowest=True)
    return {key: Evidence(change, margin_of(key), chance)}


# What the closing table repeats of the paper's, as for `glue_paper`.
PAPER_CELLS = {
    "direct": ("Direct", "Origin.", "SN-Tune"),
    "attacked": ("Avg. Harmful", "Origin.", "SN-Tune"),
    "accuracy": ("Avg. Capability", "Origin.", "SN-Tune"),
    "attacked_breaker": ("Avg. Harmful", "Circ-Break"),
    "accuracy_breaker": ("Avg. Capability", "Circ-Break"),
}


def glue_defence(stage, results, families, paper_model, asked):
    """Glue the findings of chapter 05 or 06, and the values of its closing table.

    results: model to condition to trainings to draws of `Column`; paper_model: whose cells stand beside an organism's; asked:
    languages, names of the attacks, tasks.
    """
    glue_paper({"aligned": 2, "base": 3}[stage], next(iter(results)), paper_model, **PAPER_CELLS)
    by_claim = {}
    for model, columns in results.items():
        for key, evidence in weigh_claims(stage, columns, *asked).items():
            by_claim.setdefault(key, {})[model] = evidence
    columns = next(iter(results.values()))
    percents = _percents(columns, *asked)
    for condition in (ORIGIN, BREAKER, EQ3, SPECIFIC):
        found = {name: row[condition] for name, row in percents.items() if condition in row}
        glue_text(**{f"{name}_{condition}": value for name, value in found.items()})
    numbers = {f"{stage}-{key}": text for key, text in _numbers(percents).items()}
    glue_findings(by_claim, numbers, name_runs(families))


def _percents(columns, languages, attacks, tasks):
    """Rates of the first model as text: name to condition to whole percent."""
    searched = (languages[0], *attacks)
    keys = {
        "direct": ("asr", *languages),
        "attacked": ("asr", *searched),
        "help": ("coherent", *searched),
        "refused": ("over_refusal", *languages),
        "helped": ("helpful", *languages),
        "accuracy": ("accuracy", *tasks),
    }
    keys |= {"resisted": ("asr", *attacks)} if attacks else {}
    found = {name: _texts(runs_asked(columns, *key), *key) for name, key in keys.items()}
    if not attacks:
        found |= dict.fromkeys(("attacked", "resisted", "help"), dict.fromkeys(columns, "–"))
    return found


def _texts(runs, measure, *names):
    return {c: f"{100 * estimate_rate(r, measure, *names).value:.0f}" for c, r in runs.items()}


def _numbers(percents):
    """The number to remember of every claim, without the chapter's part of its key."""

    def change(name):
        return f"{percents[name][ORIGIN]} → {percents[name][EQ3]} %"

    def beside(name):
        return f"Circ-Break {percents[name][BREAKER]} %, SN-Tune {percents[name][EQ3]} %"

    random = percents["direct"][RANDOM[EQ3]]
    return {
        "refuses": f"attack success {change('direct')}",
        "judges": f"refused: {100 - int(percents['direct'][EQ3])} % of harmful, {percents['refused'][EQ3]} % of harmless requests",
        "price": f"harmless requests refused {change('refused')}",
        "resists": f"attack success {change('resisted')}",
        "above-breaker": beside("attacked"),
        "above-breaker-help": beside("help"),
        "above-random": f"random neurons {random} %, safety neurons {percents['direct'][EQ3]} %",
        "capability": f"accuracy {change('accuracy')}",
    }
