"""Chapter 08, Figures 6 and 7: numbers of documents, epochs and learning rates."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from safetyneuron.book.claims import margin_of
from safetyneuron.book.defences import draws_asked
from safetyneuron.book.glue import glue_text, lines
from safetyneuron.book.ledger import glue_findings, name_runs
from safetyneuron.book.plots import draw_bands, rate_panels
from safetyneuron.book.tables import count_classes
from safetyneuron.kept.defences import EQ3, RANDOM, SPECIFIC
from safetyneuron.metrics.estimates import Estimate, estimate_mean
from safetyneuron.metrics.outcomes import (
    estimate_change,
    estimate_judgement,
    estimate_rate,
    outcomes_of,
    rank_chance,
)
from safetyneuron.metrics.verdict import Evidence, expect_kept

LABELS = {EQ3: "Eq 3", SPECIFIC: "without foundation", RANDOM[EQ3]: "random, like Eq 3"}


def share_classes(varied, harmful):
    """Classes of the answers by number of documents, tuned where Eq 3 says: as `class_bars` draws them. varied: model to (condition, documents) to `Runs`."""
    conditions = {
        f"{model.rpartition('/')[2]}, {count} documents": runs
        for model, cells in varied.items()
        for (condition, count), runs in cells.items()
        if condition == EQ3
    }
    return count_classes(conditions, harmful)


def measures_of(harmful, benign, tasks):
    """Panel title to measure and sets."""
    return {
        "attack success": ("asr", harmful),
        "help with harm": ("coherent", harmful),
        "over-refusal": ("over_refusal", benign),
        "helpful answers": ("helpful", benign),
        "accuracy": ("accuracy", *tasks),
    }


def headline_table(varied, grids, rates, enough, measures):
    """What training did to each model, in percent: one row a training that a finding is about. Arguments as for `glue_ablations`."""
    rows = {}
    for model, cells in varied.items():
        most, longest = max(count for _, count in cells), max(e for e, _ in grids[model])
        runs = {
            "as it is": cells[EQ3, 0],
            f"{enough} documents": cells[EQ3, enough],
            f"{enough}, random neurons": cells[RANDOM[EQ3], enough],
            f"{most} documents": cells[EQ3, most],
            f"{longest} epochs": grids[model][longest, rates[model]],
        }
        for what, found in runs.items():
            rows[model.removeprefix("organism/"), what] = {
                title: lines(estimate_rate(draws_asked(found, *key), *key))
                for title, key in measures.items()
            }
    return pd.DataFrame(rows).T.rename_axis(["model", "trained on"])


def tabulate_documents(varied, measures):
    """Long table of Figure 6: columns condition, documents, measure, set, rate. varied: (condition, documents) to `Runs`."""
    rows = [
        (LABELS[condition], count, title, "", estimate_rate(draws_asked(runs, *key), *key))
        for (condition, count), runs in varied.items()
        for title, key in measures.items()
    ]
    return pd.DataFrame(rows, columns=["condition", "documents", "measure", "set", "rate"])


def tabulate_grid(cells, measures):
    """Long table of Figure 7: columns epochs, learning_rate, measure, set, rate. cells: (epochs, learning rate) to `Runs`."""
    rows = [
        (*place, title, "", estimate_rate(runs, *key))
        for place, runs in cells.items()
        for title, key in measures.items()
    ]
    return pd.DataFrame(rows, columns=["epochs", "learning_rate", "measure", "set", "rate"])


def documents_curves(tables, measures):
    """Rates with their 95 % bands against the number of documents: one row of panels a model, one a measure.

    tables: model to the result of `tabulate_documents`.
    """

    def draw(axes, rows):
        draw_bands(axes, rows, "condition", "documents")

    first = rate_panels(tables, {(title, ""): title for title in measures}, draw, "documents")
    first.figure.set_size_inches(2.3 * len(measures), first.figure.get_figheight())
    first.figure.tight_layout()  # five titles need more room than the usual width has
    return first


def draw_grids(tables, measures):
    """Heat maps in percent over epochs and learning rates: one row a model, one panel a measure.

    tables: model to the result of `tabulate_grid`.
    """
    size = (2.6 * len(measures), 2.4 * len(tables))
    figure, panels = plt.subplots(
        len(tables), len(measures), figsize=size, squeeze=False, sharey=True
    )
    for row, (model, table) in enumerate(tables.items()):
        for column, title in enumerate(measures):
            axes, chosen = panels[row, column], table[table["measure"] == title]
            values = chosen.assign(rate=[100 * rate.value for rate in chosen["rate"]]).pivot(
                index="epochs", columns="learning_rate", values="rate"
            )
            values.columns = [f"{rate:g}" for rate in values.columns]
            options = dict(annot=True, fmt=".0f", vmin=0, vmax=100, cmap="viridis", cbar=False)
            sns.heatmap(values, ax=axes, **options)
            axes.set(xlabel="learning rate" if row == len(tables) - 1 else "", ylabel="")
            axes.set_title("" if row else title, fontsize=10)
        panels[row, 0].set_ylabel(f"{model.removeprefix('organism/')}\nepochs", fontsize=9)
    figure.tight_layout()
    return panels[0, 0]


def judge_best(cells, harmful, benign) -> Estimate:
    """How much more often harmful requests are refused than harmless ones in the best cell, chosen on one half of both, scored on the other; less one half.

    cells: (epochs, learning rate) to `Runs`.
    """
    places = list(cells)
    clusters = [
        cluster
        for measure, name in (("asr", harmful), ("over_refusal", benign))
        for cluster in outcomes_of(cells[places[0]][0][0], measure, name)[1]
    ]
    rows = []
    for training in range(len(cells[places[0]])):
        scores = [cells[place][training][0] for place in places]
        refused = np.array([1 - outcomes_of(s, "asr", harmful)[0] for s in scores])
        price = np.array([outcomes_of(s, "over_refusal", benign)[0] for s in scores])
        rows.append(np.concatenate(_best_by_halves(refused, price)))
    strata = ["harmful"] * refused.shape[1] + ["benign"] * price.shape[1]
    return estimate_mean(2 * np.array(rows)[:, None] - 0.5, clusters, strata)


def _best_by_halves(refused, price):
    """Outcomes in the cell that is best on the other half of the requests. refused, price: (cells, requests)."""
    values = np.empty(refused.shape[1]), np.empty(price.shape[1])
    parts = [np.arange(len(row)) % 2 for row in values]
    for half in (0, 1):
        own, other = ([part == h for part in parts] for h in (half, 1 - half))
        best = (refused[:, other[0]].mean(1) - price[:, other[1]].mean(1)).argmax()
        values[0][own[0]] = refused[best, own[0]]
        values[1][own[1]] = -price[best, own[1]]
    return values


def weigh_claims(varied, cells, chosen_rate, enough, harmful, benign, tasks):
    """The evidence for the chapter's claims on one model.

    Parameters
    ----------
    varied : dict
        (condition, documents) to `Runs`.
    cells : dict
        (epochs, learning rate) to `Runs`.
    chosen_rate : float
        The learning rate of the chapters before.
    enough : int
        Documents that should be enough.
    """
    counts = [count for condition, count in varied if condition == EQ3]
    whole, some, most = (varied[EQ3, count] for count in (0, enough, max(counts)))
    random = varied[RANDOM[EQ3], enough]
    fewest, longest = (end(e for e, _ in cells) for end in (min, max))
    once, often = (cells[epochs, chosen_rate] for epochs in (fewest, longest))
    effects = {
        "documents-lower": estimate_change(whole, some, "asr", harmful),
        "documents-judge": estimate_judgement(some, harmful, benign, whole),
        "documents-above-random": estimate_change(random, some, "asr", harmful),
        "epochs-cost": estimate_change(once, often, "accuracy", *tasks),
        "some-cell-judges": judge_best(cells, harmful, benign),
    }
    found = {key: Evidence(effect, margin_of(key)) for key, effect in effects.items()}
    chance = rank_chance(some, random, "asr", harmful, lowest=True)
    found["documents-above-random"] = Evidence(
        effects["documents-above-random"], margin_of("documents-above-random"), chance
    )
    found["documents-enough"] = expect_kept(estimate_change(most, some, "asr", harmful), 0.1)
    kept = estimate_change(most, whole, "accuracy", *tasks)
    return found | {"documents-capability": expect_kept(kept, 0.05)}


def glue_ablations(varied, grids, families, rates, enough, asked):
    """Glue the findings of the chapter, and the values of its closing table.

    varied, grids: model to its runs; rates: model to the learning rate of the chapters before; asked: harmful set, benign set, tasks.
    """
    harmful, benign, tasks = asked
    by_claim, texts = {}, {}
    for model in varied:
        case = (varied[model], grids[model], rates[model], enough, *asked)
        for key, evidence in weigh_claims(*case).items():
            by_claim.setdefault(key, {})[model] = evidence
        texts[model] = _numbers(*case)
    numbers = {
        key: "; ".join(f"{model.removeprefix('organism/')} {found[key]}" for model, found in texts.items())
        for key in next(iter(texts.values()))
    }  # fmt: skip
    for place, model in {"first": next(iter(varied)), "last": list(varied)[-1]}.items():
        found = texts[model]
        glue_text(**{f"model_{place}": model, f"forty_{place}": found["documents-lower"]})
        glue_text(**{f"capability_{place}": found["documents-capability"]})
        glue_text(**{f"epochs_{place}": found["epochs-cost"]})
        glue_text(**{f"best_{place}": found["some-cell-judges"]})
    glue_findings({key: by_claim[key] for key in numbers}, numbers, name_runs(families))


def _numbers(varied, cells, rate, enough, harmful, benign, tasks):
    """The number to remember of every claim, for one model."""
    most = max(count for _, count in varied)
    fewest, longest = (end(e for e, _ in cells) for end in (min, max))

    def percent(runs, measure, *names):
        return f"{100 * estimate_rate(runs, measure, *names).value:.0f}"

    def judged(count):
        return f"{100 * estimate_judgement(varied[EQ3, count], harmful, benign).value:.0f}"

    def change(measure, first, second, *names):
        return f"{percent(varied[EQ3, first], measure, *names)} → {percent(varied[EQ3, second], measure, *names)} %"

    random = percent(varied[RANDOM[EQ3], enough], "asr", harmful)
    once, often = (cells[epochs, rate] for epochs in (fewest, longest))
    skill = f"accuracy {percent(once, 'accuracy', *tasks)} → {percent(often, 'accuracy', *tasks)} %"
    fell = f"attack success {percent(once, 'asr', harmful)} → {percent(often, 'asr', harmful)} %"
    harm = 100 - int(percent(varied[EQ3, enough], "asr", harmful))
    rest = percent(varied[EQ3, enough], "over_refusal", benign)
    best = 100 * (judge_best(cells, harmful, benign).value + 0.5)
    return {
        "documents-lower": f"attack success {change('asr', 0, enough, harmful)}",
        "documents-judge": f"told apart by {judged(0)} → {judged(enough)} points (refused: {harm} % of harmful, {rest} % of harmless requests)",
        "documents-above-random": f"random {random} %, Eq 3 {percent(varied[EQ3, enough], 'asr', harmful)} %",
        "documents-enough": f"attack success {change('asr', enough, most, harmful)}",
        "documents-capability": f"accuracy {change('accuracy', 0, most, *tasks)}",
        "epochs-cost": f"{skill}; {fell}",
        "some-cell-judges": f"told apart by {best:.0f} points",
    }
