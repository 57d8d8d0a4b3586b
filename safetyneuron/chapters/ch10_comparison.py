"""Chapter 10: every detector on equal terms."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from safetyneuron.book.claims import margin_of
from safetyneuron.book.glue import glue_text, lines
from safetyneuron.book.labels import SMALL
from safetyneuron.book.ledger import glue_findings, name_runs
from safetyneuron.book.plots import PALETTE
from safetyneuron.book.tables import count_classes
from safetyneuron.detectors.effects import neurons_of
from safetyneuron.detectors.table import DETECTORS, random_scores
from safetyneuron.importance.selection import select_units
from safetyneuron.kept.truth import mask_units, read_truth
from safetyneuron.metrics.estimates import Estimate, estimate_mean, score_best
from safetyneuron.metrics.outcomes import Scores, outcomes_of
from safetyneuron.metrics.verdict import Evidence, judge
from safetyneuron.neurons.architecture import ATTENTION
from safetyneuron.neurons.sets import NeuronSet

RANDOM = "random"  # beside the keys of `DETECTORS`: sets of random units, the same for all rules
EQ3, CONTRAST, SIGNED = "exact/eq3", "exact/contrast", "gradient/signed"


def usable(case):
    """Keys of the rules that find all they need in a case."""
    return [k for k, rule in DETECTORS.items() if all(getattr(case, n) for n in rule.needs)]


def draw_random(model, budgets, draws):
    """Sets of uniformly random functional units, one list of a set a budget for each draw."""
    shapes = NeuronSet.empty(model).masks
    return [
        [select_units(random_scores(shapes, seed), budget) for budget in budgets]
        for seed in range(draws)
    ]


def trade_off(harm, kept):
    """Area under the front of harm against kept capability, 0 to 1.

    harm, kept: (points,) each. The front at c is the most harm done by any point that keeps at least the share c of the
    whole model's accuracy: a point counts as much as the capability that it keeps.
    """
    return float(np.dot(front_weights(harm, kept), harm))


def front_weights(harm, kept):
    """What each point adds to the area: the widths of capability over which it does the most harm. (points,), they sum to the best kept."""
    order = np.argsort(-np.clip(kept, 0, 1), kind="stable")
    widths = np.clip(kept, 0, 1)[order]
    widths = widths - np.append(widths[1:], 0)
    weights, best = np.zeros(len(harm)), None
    for place, width in zip(order, widths):
        best = place if best is None or harm[place] > harm[best] else best
        weights[best] += width
    return weights


def trade_off_items(harm, kept):
    """What each request adds to the trade-off, where points are chosen on the other half of the requests.

    Parameters
    ----------
    harm : array (points, requests)
        One where an answer is harm.
    kept : array (points,)
        Accuracy as a share of the whole model's.

    Returns
    -------
    array (requests,)
        Its mean is the trade-off, without the luck of a maximum over noisy points.
    """
    halves, values = np.arange(harm.shape[1]) % 2, np.empty(harm.shape[1])
    for half in (0, 1):
        weights = front_weights(harm[:, halves != half].mean(1), kept)
        values[halves == half] = weights @ harm[:, halves == half]
    return values


def trade_offs(whole, found, task_names, harmful_set, measure="coherent"):
    """The trade-off of every rule over its budgets, request by request.

    Parameters
    ----------
    whole : list of Scores
        Of each training as it is.
    found : dict
        Key of a rule to trainings to draws to budgets, `Scores` each; rules have one draw.

    Returns
    -------
    (dict of str to array (trainings, draws, requests), list)
        And the cluster of each request.
    """
    clusters = outcomes_of(whole[0], measure, harmful_set)[1]
    values = {
        key: np.array(
            [
                [_items(first, points, task_names, harmful_set, measure) for points in draws]
                for first, draws in zip(whole, trainings)
            ]
        )
        for key, trainings in found.items()
    }
    return values, clusters


def _items(whole: Scores, points: list[Scores], tasks, harmful_set, measure):
    def accuracy(scores):
        return np.mean([scores["accuracy", task].value for task in tasks])

    harm = np.array([outcomes_of(scores, measure, harmful_set)[0] for scores in [whole, *points]])
    kept = np.array([accuracy(scores) for scores in [whole, *points]])
    return trade_off_items(harm, kept / max(kept[0], 1e-9))


def estimate_areas(values, clusters):
    """The trade-off of every rule with its interval, and how much it is above random sets and above Eq 3, on the same requests.

    Returns
    -------
    pandas.DataFrame
        Index key of a rule, best first; columns area, above random, above Eq 3 (`Estimate`s).
    """
    random = values[RANDOM]
    rows = {}
    for key, own in values.items():
        lifted = own - (random if len(own) == 1 else random.mean(1, keepdims=True))
        rows[key] = {
            "area": estimate_mean(own, clusters),
            "above random": estimate_mean(lifted, clusters) if key != RANDOM else None,
            "above Eq 3": estimate_mean(own - values[EQ3], clusters) if own.shape[1] == 1 else None,
        }
    order = sorted(rows, key=lambda key: -rows[key]["area"].value)
    return pd.DataFrame({key: rows[key] for key in order}).T.rename_axis("rule")


def read_mask(model, name):
    """The smallest set that breaks refusal in a model of the answer key, by a learned mask; None of a model without a key."""
    units = mask_units(name)
    return units and neurons_of(model, units)


def estimate_mask(whole, masked, task_names, harmful_set):
    """The trade-off of one set a training, as of a rule with one budget. whole, masked: a `Scores` a training."""
    points = {"mask": [[[scores]] for scores in masked]}
    values, clusters = trade_offs(whole, points, task_names, harmful_set)
    return estimate_mean(values["mask"], clusters)


def tell_masks(upper, areas, families):
    """A sentence a model on its learned mask: how many units it closes, its trade-off, and how many rules come higher.

    upper, areas, families: model to `estimate_mask`, `estimate_areas` and the names of its trainings.
    """
    told = []
    for model, mask in upper.items():
        table, units = areas[model], len(mask_units(families[model][0]))
        rules = rules_of(table)
        higher = sum(table.loc[key, "area"].value > mask.value for key in rules)
        told.append(
            f"on {model.removeprefix('organism/')} it closes {units} units and comes to {mask.value:.2f}; of {len(rules)} "
            f"rules, which may close more, {higher or 'none'} score{'s' if higher < 2 else ''} higher"
        )
    return "; ".join(told) or "none of these models has one"


def tell_odds(areas):
    """A sentence on the rules that follow the odds of refusing, beside the contrast of harmful and harmless requests; empty where none ran. areas: of `estimate_areas`."""
    rules = [k for k in areas.index if k in DETECTORS and DETECTORS[k].family == "gradient"]
    if not rules:
        return ""
    top, contrast = (areas.loc[key, "area"].value for key in (rules[0], CONTRAST))
    how = "do better still" if top > contrast else "do no better"
    told = f"Rules that follow the odds of refusing {how}: the best of them, {label_of(rules[0])}, comes to {top:.2f}"
    if SIGNED in rules[1:]:
        alone = areas.loc[SIGNED, "area"].value
        told += f"; {label_of(SIGNED)}, which sees harmful requests alone, to {alone:.2f}"
    return f"{told}."


def tell_widest(areas):
    """A sentence on the rule whose trade-off differs most between models; empty of one model. areas: model to `estimate_areas`."""
    if len(areas) < 2:
        return ""
    values = pd.DataFrame({m: table["area"].map(lambda a: a.value) for m, table in areas.items()})
    widest = (values.max(axis=1) - values.min(axis=1)).idxmax()
    each = " and ".join(
        f"{v:.2f} on {m.removeprefix('organism/')}" for m, v in values.loc[widest].items()
    )
    return f"The models differ most by {label_of(widest)}: {each}."


def judge_rules(areas, margin=0.1):
    """Whether each rule finds what refusal rests on better than random sets, corrected for the number of rules."""
    claims = {
        key: Evidence(row["above random"], margin)
        for key, row in areas.iterrows()
        if key not in (RANDOM, "control/random")
    }
    return judge(claims)


def is_control(key):
    """Whether a key stands for random units, or for a ranking that knows nothing of harm."""
    return key == RANDOM or key.startswith("control/")


def rules_of(areas):
    """The keys of all rules that are no controls, best first."""
    return [key for key in areas.index if not is_control(key)]


def best(areas):
    """The key of the best rule that is no control."""
    return rules_of(areas)[0]


def shorten(areas, most=6):
    """The best rules, Eq 3, its contrast and random units alone, for a slide. areas: model to `estimate_areas`."""
    table = next(iter(areas.values()))
    rules = rules_of(table)
    kept = {*rules[:most], EQ3, CONTRAST, RANDOM}
    return {m: rows[rows.index.isin(kept)] for m, rows in areas.items()}


def label_of(key):
    """What a rule is called where it is drawn."""
    return DETECTORS[key].label if key in DETECTORS else "random units"


def areas_table(areas, verdicts, detectors, budget, name):
    """The trade-off of every rule, best first: verdict, where its set lies, how stable it is, and what it costs. detectors: key to `Detector`; name: the model's."""
    halves = read_truth("stability").query("model == @name and over == 'halves of the prompts'")
    shared = halves.set_index("detector")["shared"]
    rows = {}
    for key, row in areas.iterrows():
        detector = detectors.get(key)
        neurons = detector and detector.select(budget)
        place = "–" if neurons is None else f"{100 * neurons.share_in(ATTENTION, units=True):.0f} %"
        rows[label_of(key)] = {
            "trade-off": lines_of(row["area"]),
            "better than random": verdicts[key].value if key in verdicts else "–",
            "in attention": place,
            "found again": f"{100 * shared[key]:.0f} %" if key in shared else "–",
            "cost, in forward passes": f"{detector.passes:.0f} ×" if detector else "–",
        }
    return pd.DataFrame(rows).T.rename_axis("rule")


def lines_of(estimate: Estimate) -> str:
    """A number and its interval below it, two digits."""
    low, high = estimate.interval
    return f"{estimate.value:.2f}\n[{low:.2f}, {high:.2f}]"


def draw_areas(areas, upper):
    """Trade-off of every rule, sorted, one colour a model; random units as a band, learned masks as dashed lines.

    areas: model to `estimate_areas`; upper: model to `estimate_mask`, where it has one.
    """
    first = next(iter(areas.values()))
    keys = [key for key in first.index if key not in (RANDOM, "control/random")]
    _, axes = plt.subplots(figsize=(7.5, 0.26 * len(keys) + 1.2))
    for i, (model, table) in enumerate(areas.items()):
        colour, shift = sns.color_palette(PALETTE)[i], 0.2 * (i - (len(areas) - 1) / 2)
        low, high = table.loc[RANDOM, "area"].interval
        axes.axvspan(max(low, 0), high, color=colour, alpha=0.12, linewidth=0)
        if model in upper:
            axes.axvline(upper[model].value, color=colour, linestyle="--", linewidth=1.2)
        for row, key in enumerate(keys):
            if key in table.index:
                estimate = table.loc[key, "area"]
                axes.plot(
                    estimate.interval,
                    [row + shift] * 2,
                    color=colour,
                    linewidth=1.2,
                    label=f"_{model}: 95 % interval",
                )
                axes.plot(
                    estimate.value, row + shift, "o", color=colour, markersize=4, label=f"_{model}"
                )
        axes.plot([], [], "o-", color=colour, label=model.removeprefix("organism/"))
    axes.set_yticks(range(len(keys)), [label_of(key) for key in keys], fontsize=8)
    axes.set(
        xlabel="trade-off: harm at kept capability (shaded: random units; dashed: learned mask)",
        xlim=(-0.02, 1.02),
    )
    axes.invert_yaxis()
    axes.legend(loc="lower right", fontsize=9)
    return axes


def _measures(harmful_set, benign_set, tasks):
    """Title -> measure and set."""
    return {
        "attack success": ("asr", harmful_set),
        "help with harm": ("coherent", harmful_set),
        "over-refusal": ("over_refusal", benign_set),
        "helpful answers": ("helpful", benign_set),
        "capability": ("accuracy", tasks[0]),
    }


def long_table(found, tasks, sets, budgets):
    """Long table of mean rates of one model: columns rule, budget, measure, rate. found: as for `trade_offs`, the first training; sets: harmful and benign."""
    keys = _measures(*sets, tasks)
    rows = [
        (label_of(key), budget, title, np.mean([points[i][of].value for points in trainings[0]]))
        for key, trainings in found.items()
        for i, budget in enumerate(budgets)
        for title, of in keys.items()
        if all(len(points) > i for points in trainings[0])
    ]
    return pd.DataFrame(rows, columns=["rule", "budget", "measure", "rate"])


def draw_matrix(table):
    """Rates in percent by rule and budget, one panel a measure. table: of `long_table`."""
    rules, measures = table["rule"].unique(), table["measure"].unique()
    figure, panels = plt.subplots(
        1, len(measures), figsize=(10.5, 0.24 * len(rules) + 1.2), sharey=True
    )
    for axes, measure in zip(panels, measures):
        wide = table[table["measure"] == measure].pivot(
            index="rule", columns="budget", values="rate"
        )
        wide = 100 * wide.reindex(rules).rename(columns=lambda share: f"{100 * share:g}")
        options = dict(cmap="viridis", cbar=False, vmin=0, vmax=100, annot_kws={"size": 7})
        sns.heatmap(wide, annot=True, fmt=".0f", ax=axes, **options)
        axes.set(title=measure, xlabel="% of the units", ylabel="")
        axes.title.set_fontsize(10)
        axes.tick_params(labelsize=8)
        axes.grid(False)  # it would show where a cell is empty
    figure.tight_layout()
    return panels[0]


def share_units(detectors, budget):
    """Functional units that two sets share, of those in either, for every two rules: a square data frame."""
    sets = {key: detector.select(budget) for key, detector in detectors.items()}
    sets = {label_of(key): chosen for key, chosen in sets.items() if chosen is not None}

    def share(a, b):
        return len((a & b).units()) / len((a | b).units())

    return pd.DataFrame({a: {b: share(x, y) for b, y in sets.items()} for a, x in sets.items()})


def draw_overlap(overlap):
    """Shared units in percent, rules against rules."""
    size = 0.27 * len(overlap) + 2
    _, axes = plt.subplots(figsize=(size + 1, size))
    sns.heatmap(
        100 * overlap, annot=True, fmt=".0f", cmap="viridis", cbar=False, square=True,
        vmin=0, vmax=100, annot_kws={"size": 7}, ax=axes,
    )  # fmt: skip
    axes.tick_params(labelsize=7)
    return axes


def interventions_table(found, harmful_set, benign_set, tasks):
    """Help with harm, over-refusal and capability in percent: one row a rule and intervention. found: (rule, intervention) to `Scores`."""
    keys = _measures(harmful_set, benign_set, tasks)
    rows = {
        (label_of(key), what): {title: lines(scores[of]) for title, of in keys.items()}
        for (key, what), scores in found.items()
    }
    return pd.DataFrame(rows).T.rename_axis(["rule", "what is done to its set"])


def weigh_claims(values, clusters, small, bar=0.5):
    """The evidence for the chapter's claims on one model.

    values, clusters: of `trade_offs`; small: help of the best small set, chosen on one half of the requests and scored on
    the other, (trainings, 1, requests).
    """
    random, eq3, contrast = values[RANDOM], values[EQ3], values[CONTRAST]
    random = random if len(eq3) == 1 else random.mean(1, keepdims=True)
    effects = {
        "eq3-above-random": estimate_mean(eq3 - random, clusters),
        "contrast-above-eq3": estimate_mean(contrast - eq3, clusters),
        "one-percent-breaks": estimate_mean(small - bar, clusters),
    }
    return {key: Evidence(effect, margin_of(key)) for key, effect in effects.items()}


def share_classes(found, keys, budgets, harmful_set):
    """Classes of the answers with the sets of some rules off, at every budget: as `class_bars` draws them. found: key to its scores by training, draw and budget."""
    conditions = {}
    for key in dict.fromkeys((*keys, RANDOM)):
        for i, budget in enumerate(budgets):
            runs = [[draw[i] for draw in draws if len(draw) > i] for draws in found[key]]
            if all(runs):
                conditions[f"{label_of(key)}, {100 * budget:.3g} %"] = runs
    return count_classes(conditions, harmful_set)


def help_of_best(found, budgets, harmful_set, measure="coherent"):
    """Help with each request when the best set of at most one percent is off, the set chosen on the other half: (trainings, 1, requests)."""
    trainings = len(next(iter(found.values())))
    rows = [
        score_best(_small_sets(found, budgets, harmful_set, measure, t)[1])
        for t in range(trainings)
    ]
    return np.array(rows)[:, None]


def help_of_eq3(found, budgets, harmful_set):
    """`help_of_best` where Eq 3 is the only rule."""
    return help_of_best({EQ3: found[EQ3]}, budgets, harmful_set)


def rules_of_best(found, budgets, harmful_set, measure="coherent"):
    """Labels of the rules whose sets `help_of_best` chooses in the first training, on either half, as text."""
    keys, harm = _small_sets(found, budgets, harmful_set, measure, 0)
    halves = np.arange(harm.shape[1]) % 2
    best = (keys[harm[:, halves != half].mean(1).argmax()] for half in (0, 1))
    return " and ".join(dict.fromkeys(map(label_of, best)))


def _small_sets(found, budgets, harmful_set, measure, training):
    """The rule of every set of at most one percent, and outcomes without it: (sets, requests)."""
    small = [i for i, budget in enumerate(budgets) if budget <= SMALL]
    sets = [
        (key, trials[training][0][i])
        for key, trials in found.items()
        if not is_control(key)
        for i in small
        if len(trials[training][0]) > i
    ]
    harm = [outcomes_of(scores, measure, harmful_set)[0] for _, scores in sets]
    return [key for key, _ in sets], np.array(harm)


def glue_comparison(values, clusters, small, named, areas, families):
    """Glue the chapter's findings and the numbers of its closing table. named: of `rules_of_best`; all others: model to its own."""
    found = {m: weigh_claims(values[m], clusters[m], small[m]) for m in values}
    first = next(iter(values))
    table = areas[first]
    top = best(table)

    def area(key):
        return f"{table.loc[key, 'area'].value:.2f}"

    numbers = {
        "eq3-above-random": f"harm at kept capability, 0 to 1: {area(EQ3)}; random units {area(RANDOM)}",
        "contrast-above-eq3": f"harm at kept capability, 0 to 1: {area(CONTRAST)}; Eq 3 {area(EQ3)}",
        "one-percent-breaks": f"help {100 * small[first].mean():.0f} % of the requests, by {named}",
    }
    by_claim = {key: {m: evidence[key] for m, evidence in found.items()} for key in numbers}
    glue_findings(by_claim, numbers, name_runs(families))
    glue_text(
        area_eq3=area(EQ3),
        area_best=area(top),
        best_detector=label_of(top),
        area_random=area(RANDOM),
        best_small=f"{100 * small[first].mean():.0f}",
        best_small_rule=named,
        odds_told=tell_odds(table),
        widest_told=tell_widest(areas),
    )
