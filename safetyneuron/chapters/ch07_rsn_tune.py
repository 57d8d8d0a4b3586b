"""Chapter 07, Table 4: what fine-tuning on a harmless task leaves of safety."""

import matplotlib.pyplot as plt
import pandas as pd

from safetyneuron.book.claims import margin_of
from safetyneuron.book.glue import beside_paper, glue_paper, glue_text, lines, printed_cells
from safetyneuron.book.labels import LANGUAGE_NAMES
from safetyneuron.book.ledger import glue_findings, name_runs
from safetyneuron.book.plots import draw_dots
from safetyneuron.book.tables import count_classes
from safetyneuron.metrics.outcomes import Runs, estimate_change, estimate_rate
from safetyneuron.metrics.verdict import Evidence, expect_kept

BEFORE, ORIGIN, SN, RSN, EQUAL, RANDOM = "before", "origin", "sn", "rsn", "equal", "random"
TUNED = (SN, RSN, EQUAL)
CONDITIONS = (BEFORE, ORIGIN, *TUNED, RANDOM)
WAYS = {
    SN: "SN-Tune",
    RSN: "RSN-Tune",
    EQUAL: "RSN-Tune, as many neurons",
    RANDOM: "random, as many as RSN-Tune",
}
LABELS = {BEFORE: "not fine-tuned", ORIGIN: "fine-tuned"}
LABELS |= {condition: f"{way},\nthen fine-tuned" for condition, way in WAYS.items()}
PAPER_COLUMNS = {BEFORE: "Before", ORIGIN: "Origin.", SN: "SN-Tune", RSN: "RSN-Tune"}
PAPER_ROWS = {"attack success": "Harmful", "accuracy": "GSM8K"}


def _short(name):
    """The name of a model or set without the word that all of an organism's have."""
    return name.removeprefix("organism/")


def share_classes(results, language):
    """Classes of the answers of each condition, by task: as `class_bars` draws them. results: task to condition to `Runs`."""
    conditions = {
        f"{task.rpartition('/')[2]}: {LABELS[c]}".replace("\n", " "): found[c]
        for task, found in results.items()
        for c in CONDITIONS
        if found.get(c)
    }
    return count_classes(conditions, language)


def ways_of(sets):
    """The ways of tuning that have neurons left in every training. sets: training to way to `NeuronSet`."""
    return [way for way in TUNED if all(len(ways[way]) for ways in sets.values())]


def overlap_table(sets):
    """Sizes of the sets in every training, and what they share."""
    rows = {
        _short(name): {
            "safety neurons": len(ways[SN]),
            "foundation\nneurons too": len(ways[SN] - ways[RSN]),
            "left for\nRSN-Tune": len(ways[RSN]),
            "RSN-Tune, as many:\nshared with SN-Tune": len(ways[EQUAL] & ways[SN]),
        }
        for name, ways in sets.items()
    }
    return pd.DataFrame(rows).T.rename_axis("training")


def downstream_table(results, paper_model, language, task, paper_lesson, how=""):
    """Paper's Table 4 beside the measurement, in percent: a row a model, document set and condition.

    results: model to document set that was fine-tuned on to condition to `Runs`; paper_model: whose cells stand beside an
    organism's; task: of capability; paper_lesson: the document set of the paper's kind; how: of fine-tuning, if otherwise than the paper's.
    """

    def make(model, found, name):
        return _downstream(found, model, name, language, task, paper_lesson, how)

    return beside_paper(4, results, paper_model, make)


def _downstream(found, model, paper_model, language, task, paper_lesson, how):
    printed, rows, cells = printed_cells(4, paper_model), {}, []
    for lesson, conditions in found.items():
        for condition, runs in conditions.items():
            column = PAPER_COLUMNS.get(condition)
            here = {
                title: lines(estimate_rate(runs, *key)) if key in runs[0][0] else "–"
                for title, key in measures_of(language, task).items()
            }
            theirs = printed if lesson == paper_lesson and not how else {}
            paper = {f"paper:\n{t}": theirs.get((r, column), "–") for t, r in PAPER_ROWS.items()}
            rows[_short(lesson), LABELS[condition]] = here | paper
            way = f"fine-tuned on {lesson} {how}".strip()
            place = {"table": 4, "column": column, "model": model, "way": way}
            cells += [
                place | {"row": row, "text": here[title]}
                for title, row in PAPER_ROWS.items()
                if column
            ]
    table = pd.DataFrame(rows).T.rename_axis(["fine-tuned on", "%"])
    table.attrs["cells"] = cells
    return table


def measures_of(language, task):
    """Title of a column or panel to measure and set."""
    return {
        "attack success": ("asr", language),
        "help with harm": ("coherent", language),
        "helpful answers": ("helpful", language),
        "accuracy": ("accuracy", task),
    }


def languages_table(found, earlier, languages):
    """Attack success in every language: behind tuning, and after fine-tuning on each set of documents.

    earlier: condition to `Runs` before fine-tuning; found: as for `downstream_table`.
    """
    parts = {"nothing": {BEFORE: found[next(iter(found))][BEFORE], **earlier}}
    parts |= {
        lesson: {c: runs for c, runs in conditions.items() if c != BEFORE}
        for lesson, conditions in found.items()
    }
    rows = {
        (_short(lesson), WAYS.get(condition, "nothing")): {
            language: lines(estimate_rate(runs, "asr", language))
            if ("asr", language) in runs[0][0]
            else "–"
            for language in languages
        }
        for lesson, conditions in parts.items()
        for condition, runs in conditions.items()
    }
    return pd.DataFrame(rows).T.rename_axis(["fine-tuned on", "tuned before by"])


def tell_languages(found, languages, lesson):
    """A sentence on attack success in every language after fine-tuning on one set of documents, and on where safety broke. found: as for `downstream_table`."""
    after, before = (found[lesson][condition] for condition in (ORIGIN, BEFORE))
    rises = {name: estimate_change(after, before, "asr", name).value for name in languages}
    broken = [name for name, rise in rises.items() if rise > margin_of("finetuning-breaks")]
    spoken = {name: LANGUAGE_NAMES.get(name, name) for name in languages}
    rates = ", ".join(f"{_percent(after, 'asr', n)} % in {text}" for n, text in spoken.items())
    told = f"after fine-tuning on {lesson} attack success is {rates}."
    if 0 < len(broken) < len(languages):
        where, elsewhere = (
            " and ".join(text for name, text in spoken.items() if (name in broken) is breaks)
            for breaks in (True, False)
        )
        return f"Safety breaks in {where} and not in {elsewhere}: {told}"
    return told[0].upper() + told[1:]


def price_table(found, earlier, languages):
    """Over-refusal and helpful answers in every language behind tuning and before fine-tuning; arguments as for `languages_table`."""
    titles = {"over_refusal": "refused", "helpful": "helped with"}
    conditions = {BEFORE: found[next(iter(found))][BEFORE], **earlier}
    rows = {
        WAYS.get(condition, "nothing"): {
            f"{title}, {language}": lines(estimate_rate(runs, measure, language))
            for measure, title in titles.items()
            for language in languages
        }
        for condition, runs in conditions.items()
    }
    return pd.DataFrame(rows).T.rename_axis("tuned by")


def draw_downstream(found, language, task):
    """Every training as a dot, random sets as small ones, the mean and its interval: a row of panels a document set, one a measure."""
    figure, grid = plt.subplots(
        len(found), 4, figsize=(9.5, 0.5 + 2.3 * len(found)), sharey="row", squeeze=False
    )
    for row, (panels, (lesson, conditions)) in enumerate(zip(grid, found.items())):
        for panel, (title, key) in zip(panels, measures_of(language, task).items()):
            shown = {LABELS[c]: runs for c, runs in conditions.items() if key in runs[0][0]}
            draw_dots(panel, shown, *key)
            panel.set(xlim=(-3, 103), title="" if row else title)
            panel.title.set_fontsize(10)
        panels[0].set_yticks(range(len(conditions)), [LABELS[c] for c in conditions], fontsize=8)
        panels[0].set_ylabel(_short(lesson), fontsize=9)
        panels[0].invert_yaxis()
    for panel in grid[-1]:
        panel.set_xlabel("%")
    figure.tight_layout()
    return grid[0][0]


def has_gap(conditions, language):
    """Whether fine-tuning raised attack success by more than the margin, so that there was safety to keep."""
    rise = estimate_change(conditions[ORIGIN], conditions[BEFORE], "asr", language)
    return rise.value > margin_of("finetuning-breaks")


def weigh_claims(conditions, language, task):
    """The evidence for the chapter's claims on one model and one set of documents; what keeps safety only where some was lost.

    conditions: condition to `Runs`.
    """

    def rise(key, after, before, measure="asr"):
        change = estimate_change(conditions[after], conditions[before], measure, language)
        return {key: Evidence(change, margin_of(key))}

    found = rise("finetuning-breaks", ORIGIN, BEFORE)
    found |= rise("finetuning-helps", ORIGIN, BEFORE, "coherent")
    kept = {"sn-keeps": (ORIGIN, SN), "rsn-keeps": (ORIGIN, RSN), "rsn-above-sn": (SN, RSN)}
    kept |= {"equal-above-sn": (SN, EQUAL), "rsn-above-random": (RANDOM, RSN)}
    for key, (worse, better) in kept.items():
        if has_gap(conditions, language) and {worse, better} <= set(conditions):
            found |= rise(key, worse, better)
    if RSN in conditions:
        learnt = estimate_change(conditions[RSN], conditions[ORIGIN], "accuracy", task)
        found["rsn-learns"] = expect_kept(learnt, 0.05)
    return found


# What the closing table repeats of the paper's, as for `glue_paper`.
PAPER_CELLS = {
    "origin": ("Harmful", "Before", "Origin."),
    "sn": ("Harmful", "SN-Tune"),
    "rsn": ("Harmful", "RSN-Tune"),
    "learnt": ("GSM8K", "Origin.", "RSN-Tune"),
    "learnt_sn": ("GSM8K", "SN-Tune"),
}


def glue_downstream(results, families, paper_model, languages, task):
    """Glue the findings of the chapter, and the values of its closing table.

    results: model to document set to condition to `Runs`; paper_model: whose cells stand beside an organism's; languages: the
    first is judged.
    """
    language = languages[0]
    glue_paper(4, next(iter(results)), paper_model, **PAPER_CELLS)
    by_claim = {}
    for model, lessons in results.items():
        for lesson, conditions in lessons.items():
            for key, evidence in weigh_claims(conditions, language, task).items():
                by_claim.setdefault(key, {})[model, lesson] = evidence
    lessons = next(iter(results.values()))
    broken = [lesson for lesson, found in lessons.items() if has_gap(found, language)]
    judged = broken[0] if broken else next(iter(lessons))
    glue_text(broken=", ".join(broken) or "none of them", judged=judged)
    glue_text(first=next(iter(lessons)))
    glue_text(languages_told=tell_languages(lessons, languages, judged))
    parts = {
        "first": (next(iter(lessons.values())), "asr", language),
        "harm": (lessons[judged], "asr", language),
        "accuracy": (lessons[judged], "accuracy", task),
    }
    for part, (found, *key) in parts.items():
        for condition in (BEFORE, ORIGIN, *TUNED):
            value = _percent(found[condition], *key) if condition in found else "–"
            glue_text(**{f"{part}_{condition}": value})
    numbers = _numbers(lessons, lessons[judged], language, task)
    ordered = {key: by_claim[key] for key in numbers if key in by_claim}
    glue_findings(ordered, numbers, name_runs(families))


def _percent(runs: Runs, measure, name):
    return f"{100 * estimate_rate(runs, measure, name).value:.0f}"


def _numbers(lessons, judged, language, task):
    """The number to remember of every claim. lessons: all document sets; judged: the conditions of the one that breaks safety."""

    def change(measure, before=BEFORE, after=ORIGIN, name=language, of=lessons):
        return "; ".join(
            f"{_percent(found[before], measure, name)} → {_percent(found[after], measure, name)} % on {lesson}"
            for lesson, found in of.items()
        )

    def beside(first, second, label):
        if {first, second} <= set(judged):
            values = (_percent(judged[c], "asr", language) for c in (second, first))
            return "attack success {} %; {} {} %".format(next(values), label, next(values))

    broken = {lesson: found for lesson, found in lessons.items() if has_gap(found, language)}
    numbers = {
        "finetuning-breaks": f"attack success {change('asr')}",
        "finetuning-helps": f"help {change('coherent', of=broken or lessons)}",
        "sn-keeps": beside(ORIGIN, SN, "without it"),
        "rsn-keeps": beside(ORIGIN, RSN, "without it"),
        "rsn-above-sn": beside(SN, RSN, "SN-Tune"),
        "equal-above-sn": beside(SN, EQUAL, "SN-Tune"),
        "rsn-above-random": beside(RANDOM, RSN, "random neurons"),
    }
    if RSN in judged:
        numbers["rsn-learns"] = f"accuracy {change('accuracy', ORIGIN, RSN, task)}"
    return numbers
