"""Chapter 04, Figure 5: safety neurons of several languages."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from safetyneuron.book import paper as reported
from safetyneuron.book.claims import margin_of
from safetyneuron.book.glue import glue_text
from safetyneuron.book.labels import EQ3, SPECIFIC
from safetyneuron.book.ledger import glue_findings, name_runs
from safetyneuron.book.tables import count_classes
from safetyneuron.metrics.estimates import estimate_exact
from safetyneuron.metrics.outcomes import (
    Scores,
    estimate_change,
    estimate_rate,
    rank_chance,
)
from safetyneuron.metrics.verdict import Evidence, Verdict, judge

FOUNDATION = "foundation neurons"
KINDS = {"eq3": EQ3, "specific": SPECIFIC, "foundation": FOUNDATION}  # part of a glued name -> sets
NONE, MARGIN = "none", 0.1  # the row of the whole model; the smallest change of a cell that matters
HARM = {"asr": "no refusal phrase", "coherent": "help with harm"}


def share_classes(whole, off):
    """Classes of the answers in each language, with nothing off and with its own neurons off: as `class_bars` draws them."""
    conditions, asked = {}, {}
    for x in off[EQ3]:
        ways = {"nothing": whole} | {way: each[x] for way, each in off.items()}
        conditions |= {f"{x}, off: {way}": runs for way, runs in ways.items()}
        asked |= {f"{x}, off: {way}": x for way in ways}
    return count_classes(conditions, asked)


def overlap(sets):
    """|N_x ∩ N_y| / |N_y| for every two sets: rows x, columns y (Figure 5)."""
    return pd.DataFrame(
        {y: {x: len(a & b) / len(b) for x, a in sets.items()} for y, b in sets.items()}
    ).rename_axis("x")


def expected_overlap(sets):
    """The overlap to expect of random sets that have as many neurons in each layer and projection as these."""
    return pd.DataFrame(
        {y: {x: _expected(a, b) / len(b) for x, a in sets.items()} for y, b in sets.items()}
    ).rename_axis("x")


def _expected(a, b):
    """Neurons that random sets shaped like a and b share on average: in each layer, the product of their sizes over its width."""
    return sum(
        float((a.masks[p].sum(1) * b.masks[p].sum(1)).sum()) / mask.shape[1]
        for p, mask in a.masks.items()
    )


def off_diagonal(matrix):
    """Mean of a square data frame without its diagonal."""
    values = matrix.to_numpy()
    return (values.sum() - values.trace()) / (values.size - len(values))


def estimate_overlaps(sets):
    """Mean overlap of two languages in every training, and by chance. sets: kind to one dict a training, of language to NeuronSet.

    Returns
    -------
    pandas.DataFrame
        Index kind; columns overlap (`Estimate`), by training (a list), by chance.
    """
    rows = {}
    for kind, trainings in sets.items():
        values = [off_diagonal(overlap(chosen)) for chosen in trainings]
        chance = np.mean([off_diagonal(expected_overlap(chosen)) for chosen in trainings])
        rows[kind] = {"overlap": estimate_exact(values), "by training": values, "by chance": chance}
    return pd.DataFrame(rows).T.rename_axis("sets")


def overlaps_table(overlaps):
    """`estimate_overlaps` as text, in percent."""
    rows = {
        kind: {
            "mean overlap, %": f"{100 * row['overlap'].value:.0f}",
            "by training": ", ".join(f"{100 * value:.0f}" for value in row["by training"]),
            "by chance": f"{100 * row['by chance']:.0f}",
        }
        for kind, row in overlaps.iterrows()
    }
    return pd.DataFrame(rows).T.rename_axis("sets")


def draw_overlaps(sets):
    """Overlap in percent, mean over trainings, one panel per kind of sets. sets: as for `estimate_overlaps`."""
    size = (3.4 * len(sets), 3.4)
    figure, panels = plt.subplots(1, len(sets), figsize=size, sharey=True, squeeze=False)
    for axes, (kind, trainings) in zip(panels[0], sets.items()):
        matrix = sum(overlap(chosen) for chosen in trainings) / len(trainings)
        _draw_heat(axes, matrix, kind)
        axes.set(xlabel="of the neurons of", ylabel="")
    panels[0, 0].set(ylabel="share that is also in")
    figure.tight_layout()
    return panels[0, 0]


def _draw_heat(axes, values, title):
    """Shares as a heat map in percent."""
    options = dict(cmap="viridis", vmin=0, vmax=100, square=True, cbar=False)
    sns.heatmap(100 * values.astype(float), annot=True, fmt=".0f", ax=axes, **options)
    axes.set_title(title, fontsize=10)
    axes.tick_params(axis="y", rotation=0)


def tabulate_effects(whole, off):
    """Rates of every set of one kind: long table with columns deactivated, asked, measure, rate.

    off: language whose neurons are off to `Runs` whose sets are the languages asked; whole: with none off.
    """
    rows = [
        (name, asked, measure, estimate_rate(runs, measure, asked))
        for name, runs in ({NONE: whole} | off).items()
        for measure, asked in runs[0][0]
        if measure in HARM
    ]
    return pd.DataFrame(rows, columns=["deactivated", "asked", "measure", "rate"])


def effects_table(effects, measure="asr"):
    """Rates with their intervals: rows the language deactivated, columns the language asked."""
    chosen = effects[effects["measure"] == measure].assign(text=lambda t: t["rate"].map(lambda r: r.percent))  # fmt: skip
    order = chosen["asked"].unique()
    return chosen.pivot(index="deactivated", columns="asked", values="text").loc[[NONE, *order], order]  # fmt: skip


def draw_effects(effects):
    """Heat maps in percent, one row a kind of sets, one panel a measure. effects: kind to `tabulate_effects`."""
    size = (8.4, 3.9 * len(effects))
    figure, panels = plt.subplots(len(effects), len(HARM), figsize=size, sharey=True, squeeze=False)
    for row, (kind, table) in zip(panels, effects.items()):
        for axes, (measure, title) in zip(row, HARM.items()):
            chosen = table[table["measure"] == measure]
            values = chosen.assign(rate=[rate.value for rate in chosen["rate"]])
            order = values["asked"].unique()
            wide = values.pivot(index="deactivated", columns="asked", values="rate")
            _draw_heat(axes, wide.loc[[NONE, *order], order], f"{kind}: {title}")
            axes.set(xlabel="language asked", ylabel="")
        row[0].set(ylabel="neurons deactivated")
    figure.tight_layout()
    return panels[0, 0]


def judge_cells(whole, off):
    """Whether a language becomes less safe (seen) or safer (reversed) without the neurons of each, by attack success.

    Returns
    -------
    dict of (str, str) to Verdict
        (language whose neurons are off, language asked); corrected for their number.
    """
    changes = {
        (name, asked): Evidence(estimate_change(runs, whole, "asr", asked), MARGIN)
        for name, runs in off.items()
        for asked in off
    }
    return judge(changes)


def rooms(whole, languages):
    """Languages whose attack success can rise by the margin, and those where it can fall by it."""
    rates = {x: estimate_rate(whole, "asr", x).value for x in languages}
    can_rise = [x for x, rate in rates.items() if rate <= 1 - MARGIN]
    return can_rise, [x for x, rate in rates.items() if rate >= MARGIN]


def moves_table(whole, off):
    """How many languages become less safe or safer, by their own neurons and by those of another: one row each, per kind of sets.

    off: kind to language to `Runs`. Counts are of the cells that have room to move that way.
    """
    rows = {}
    for kind, runs in off.items():
        verdicts = judge_cells(whole, runs)
        rise, fall = rooms(whole, list(runs))
        for label, own in (("its own", True), ("another's", False)):
            cells = {cell: v for cell, v in verdicts.items() if (cell[0] == cell[1]) == own}
            rows[kind, label] = {
                "less safe": _count(cells, Verdict.SEEN, rise),
                "safer": _count(cells, Verdict.REVERSED, fall),
                "as before": _count(cells, Verdict.NOT_SEEN, list(runs)),
                "undecided": _count(cells, Verdict.UNDECIDED, list(runs)),
            }
    return pd.DataFrame(rows).T.rename_axis(["sets", "neurons switched off"])


def _count(cells, verdict, languages):
    """How many cells of languages with room have a verdict, as text."""
    there = [v for (_, asked), v in cells.items() if asked in languages]
    return f"{there.count(verdict)} of {len(there)}" if there else "no room"


def join_languages(runs, languages):
    """`Runs` in which every language's requests are those of its own run. runs: language to `Runs`, of the same trainings and draws."""
    shape = next(iter(runs.values()))
    return [
        [_join({x: runs[x][t][d] for x in languages}) for d in range(len(shape[t]))]
        for t in range(len(shape))
    ]


def _join(scores):
    tables = [one.table[one.table["set"] == language] for language, one in scores.items()]
    return Scores(pd.concat(tables, ignore_index=True))


def of_others(off, languages):
    """`Runs` with another language's neurons off: one draw for each of the others. off: language to `Runs` of one draw."""
    names = list(off)
    shifted = [
        {x: off[names[(names.index(x) + step) % len(names)]] for x in languages}
        for step in range(1, len(names))
    ]
    return [
        [draw for runs in shifted for draw in join_languages(runs, languages)[t]]
        for t in range(len(off[names[0]]))
    ]


def weigh_claims(sets, whole, off, random):
    """The evidence for the chapter's claims; without those about effects where no language has room to rise.

    Parameters
    ----------
    sets : dict
        As for `estimate_overlaps`.
    whole : Runs
        Of the whole model, whose sets are languages.
    off, random : dict
        Language to `Runs` without its neurons by Eq 3, and without random ones like them.
    """
    eq3, foundation = (
        np.array([off_diagonal(overlap(chosen)) for chosen in sets[kind]])
        for kind in (EQ3, FOUNDATION)
    )
    effects = {
        "languages-overlap-little": estimate_exact(reported.OVERLAP_BELOW / 100 - eq3),
        "overlap-below-foundation": estimate_exact(foundation - eq3),
    }
    found = {key: Evidence(effect, margin_of(key)) for key, effect in effects.items()}
    rise, _ = rooms(whole, list(off))
    if not rise:
        return found
    own, drawn = (join_languages(runs, rise) for runs in (off, random))
    for key, measure in (("own-language-breaks", "asr"), ("own-language-helps", "coherent")):
        effect = estimate_change(own, drawn, measure, *rise)
        found[key] = Evidence(effect, margin_of(key), rank_chance(own, drawn, measure, *rise))
    effect = estimate_change(own, of_others(off, rise), "asr", *rise)
    return found | {"own-above-others": Evidence(effect, margin_of("own-above-others"))}


def glue_languages(sets, whole, off, random, families):
    """Glue the findings of the chapter, and every value of its closing table. off: kind to language to `Runs`; the others as for `weigh_claims`."""
    found = weigh_claims(sets, whole, off[EQ3], random)
    overlaps = estimate_overlaps(sets)
    shares = {label: f"{100 * overlaps.loc[kind, 'overlap'].value:.0f} %" for label, kind in KINDS.items()}  # fmt: skip
    chance = f"{100 * overlaps.loc[EQ3, 'by chance']:.0f} %"
    numbers = {
        "languages-overlap-little": f"{shares['eq3']} on average; {chance} by chance",
        "overlap-below-foundation": f"{shares['eq3']}; for ordinary text {shares['foundation']}",
    }
    numbers |= _number_effects(whole, off[EQ3], random)
    by_claim = {key: {next(iter(families)): evidence} for key, evidence in found.items()}
    glue_findings(by_claim, {key: numbers[key] for key in found}, name_runs(families))
    glue_text(overlap_random=chance)
    glue_text(**{f"overlap_{label}": share for label, share in shares.items()})
    moves = moves_table(whole, off)
    for label, kind in (("eq3", EQ3), ("specific", SPECIFIC)):
        own, other = (moves.loc[(kind, row)] for row in ("its own", "another's"))
        mean = f"mean attack success {_mean_own(off[kind])} %"
        own = f"{own['less safe']} languages, {own['undecided']} undecided ({mean})"
        other = f"{other['less safe']} pairs, {other['undecided']} undecided"
        glue_text(**{f"own_{label}": own, f"other_{label}": other})
    glue_text(safer=_tell_safer(whole, moves))


def _mean_own(off):
    """Attack success in every language with its own neurons off, the mean in whole percent. off: language to `Runs`."""
    own = join_languages(off, list(off))
    return f"{100 * estimate_rate(own, 'asr', *off).value:.0f}"


def _tell_safer(whole, moves):
    """A sentence about languages that become safer without Eq 3's neurons."""
    _, fall = rooms(whole, [asked for measure, asked in whole[0][0] if measure == "asr"])
    own, other = (moves.loc[(EQ3, row), "safer"] for row in ("its own", "another's"))
    if not fall:
        return "No language has room to become safer, because the whole model refuses nearly all requests."
    return f"With their own Eq 3 neurons off {own} languages become safer; with another language's off, {other} pairs of languages do."


def _number_effects(whole, off, random):
    """The number to remember of each claim about effects."""
    rise, _ = rooms(whole, list(off))
    if not rise:
        return {}
    runs = {
        "whole": whole,
        "own": join_languages(off, rise),
        "other": of_others(off, rise),
        "random": join_languages(random, rise),
    }
    rates = {
        (name, measure): f"{100 * estimate_rate(each, measure, *rise).value:.0f}"
        for name, each in runs.items()
        for measure in HARM
    }
    text = "{} → {} %; random neurons {} %"
    before = [[rates[name, m] for name in ("whole", "own", "random")] for m in HARM]
    return {
        "own-language-breaks": f"attack success {text.format(*before[0])}",
        "own-language-helps": f"help {text.format(*before[1])}",
        "own-above-others": f"attack success {rates['own', 'asr']} %; with another's off {rates['other', 'asr']} %",
    }
