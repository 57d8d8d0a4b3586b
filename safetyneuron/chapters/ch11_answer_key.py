"""Chapter 11: every detector against the answer key."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from sklearn.metrics import roc_auc_score

from safetyneuron.book.claims import margin_of
from safetyneuron.book.glue import glue_text, lines
from safetyneuron.book.ledger import glue_findings
from safetyneuron.book.plots import PALETTE
from safetyneuron.detectors.effects import neurons_of, units_named
from safetyneuron.detectors.table import DETECTORS
from safetyneuron.kept.truth import (
    GREEDY,
    LIMIT,
    MASK,
    NATURAL,
    PLANTED,
    log_odds_changes,
    read_truth,
)
from safetyneuron.metrics.estimates import Estimate, estimate_exact, estimate_mean
from safetyneuron.metrics.outcomes import Scores, estimate_change, estimate_rate, outcomes_of
from safetyneuron.metrics.shortfalls import leaky_keys
from safetyneuron.metrics.verdict import Evidence
from safetyneuron.models import load_model
from safetyneuron.neurons.architecture import Architecture
from safetyneuron.organism import decoy_neurons, manifest, planted_neurons

NEVER = 1.5 * LIMIT  # where the poster puts rules that do not break refusal
EQ3, CONTRAST, ACTIVITY = "exact/eq3", "exact/contrast", "control/benign"
SHORT = {NATURAL: "naturally aligned", PLANTED: "planted"}
KINDS = {
    "llama-planted": "all projections",
    "llama-planted-attention": "attention only",
    "llama-planted-mlp": "feed-forward only",
}


def label_of(key: str) -> str:
    """What a rule is called where it is drawn."""
    extra = {MASK: "learned mask", GREEDY: "greedy search"}
    return DETECTORS[key].label if key in DETECTORS else extra[key]


def compete(key: str) -> bool:
    """Whether a rule sees only the aligned model and is no control: only such rules are compared for being best."""
    rule = DETECTORS.get(key)
    return rule is not None and rule.family != "control" and "base" not in rule.needs


def compare_pairs(ranking: dict, planted, decoys) -> float:
    """Probability that a planted unit stands above a decoy: the AUC, by counting pairs. planted, decoys: `Units`."""
    inside, outside = (
        np.concatenate([ranking[kind][mask].numpy() for kind, mask in units.kinds.items()])
        for units in (planted, decoys)
    )
    difference = inside[:, None] - outside
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def by_training(planted: pd.DataFrame, measure: str) -> pd.DataFrame:
    """A measure of every rule: index (kind, detector), one column a training."""
    return planted.pivot(index=["kind", "detector"], columns="training", values=measure)


def estimate_trainings(values) -> Estimate:
    """Mean over trainings and kinds of planting, with an interval over trainings. values: (kinds, trainings) or (trainings,)."""
    return estimate_exact(np.atleast_2d(np.asarray(values, dtype=float)).mean(0))


def summarise_planted(planted: pd.DataFrame) -> pd.DataFrame:
    """AUC and precision of every rule over kinds and trainings, best first: columns are `Estimate`s."""
    rows = {}
    for measure in ("auc", "precision"):
        table = by_training(planted, measure)
        rows[measure] = {
            key: estimate_trainings(table.xs(key, level="detector"))
            for key in table.index.unique("detector")
            if table.xs(key, level="detector").notna().all(axis=None)
        }
    order = sorted(rows["auc"], key=lambda key: -rows["auc"][key].value)
    return pd.DataFrame(rows).reindex(order).rename_axis("detector")


def units_needed(breaking: pd.DataFrame, model: str) -> pd.Series:
    """How many units each method switches off before refusal breaks; NaN where `LIMIT` are not enough."""
    return breaking[breaking["model"] == model].set_index("method")["units"]


def sets_found(model, name: str) -> list:
    """Small sets that break refusal and share no unit, as neurons, in the order in which masks found them."""
    backups = read_truth("backups").query("model == @name").sort_values("round")
    return [neurons_of(model, units_named(text)) for text in backups["which"]]


def glue_checks(planted: pd.DataFrame) -> None:
    """Glue what the keys' shortfalls do to the means, and what is seen by who holds the model before alignment."""
    leaky, keys = leaky_keys(manifest()), planted["kind"] + "@" + planted["training"].astype(str)
    whole, rest = (mean_auc(rows) for rows in (planted, planted[~keys.isin(leaky)]))
    glue_text(n_leaky=len(leaky), n_keys=keys.nunique())
    glue_text(leaky_shift=f"{(whole - rest).abs().max():.3f}")
    moved = [tell_by_change(key) for key in keys.unique()]
    glue_text(moved_low=f"{min(moved):.2f}", moved_high=f"{max(moved):.2f}")


def mean_auc(planted: pd.DataFrame) -> pd.Series:
    """Of every rule, the mean over kinds of its means over trainings."""
    means = planted.groupby(["kind", "detector"])["auc"].mean()
    return means.groupby("detector").mean()


def tell_by_change(key: str) -> float:
    """AUC by which the relative change of rows since before alignment tells planted neurons from decoys. key: `llama-planted@3`."""
    name, parent = f"organism/{key}", f"organism/{manifest()[key]['parent']}"
    now, before = (Architecture(load_model(n)[0]) for n in (name, parent))
    values, classes = [], []
    for is_planted, neurons in ((1, planted_neurons(name)), (0, decoy_neurons(name))):
        for projection, layer, channels in neurons.by_layer():
            new, old = (a.place(layer, projection).weight[channels] for a in (now, before))
            values.append(((new - old).norm(dim=1) / old.norm(dim=1)).detach())
            classes += [is_planted] * len(channels)
    return float(roc_auc_score(classes, torch.cat(values).numpy()))


def choose_best(planted: pd.DataFrame, kind: str) -> np.ndarray:
    """AUC in each training of the rule that is best in the others, among those that `compete`. (trainings,)"""
    table = by_training(planted, "auc").loc[kind]
    table = table[[compete(key) for key in table.index]]
    return np.array([table.loc[table.drop(columns=t).mean(axis=1).idxmax(), t] for t in table])


def correlate_items(scores: np.ndarray, support: np.ndarray) -> np.ndarray:
    """What each unit adds to the rank correlation of two arrays: (units,), their mean is Spearman's rho."""
    ranks = [pd.Series(values).rank().to_numpy() for values in (scores, support)]
    first, second = ((r - r.mean()) / r.std() for r in ranks)
    return first * second


def support_of(units: pd.DataFrame, ablation: str = "zero") -> np.ndarray:
    """How much less the model refuses without each unit: the fall in log odds on harmful requests, in nats."""
    return 0 - log_odds_changes(units, f"{ablation} harmful")


def estimate_agreement(name: str, key: str) -> Estimate:
    """Rank correlation of a rule with what units of a model do alone, its interval over blocks of units."""
    short = name.removeprefix("organism/")
    units, ranks = read_truth(f"units-{short}"), read_truth(f"ranks-{short}")
    items = correlate_items(-ranks[key].to_numpy(), support_of(units))
    blocks = list(units[["kind", "layer"]].itertuples(index=False, name=None))
    return estimate_mean(items[None, None], blocks)


def _help_above_half(scores, harmful):
    """Share of requests answered with help, less one half; none are where no such set was found."""
    if scores is None:
        return estimate_exact([-0.5])
    values, clusters = outcomes_of(scores, "coherent", harmful)
    return estimate_mean(values[None, None] - 0.5, clusters)


def weigh_claims(planted: pd.DataFrame, single: dict[tuple, Scores], harmful: str) -> dict:
    """The evidence for the chapter's claims. single: (model, number of a set) to what became of requests without that set."""
    auc = by_training(planted, "auc")

    def over_kinds(effect):
        return {"planted models": estimate_trainings([effect(kind) for kind in KINDS])}

    found = {
        "best-finds-planted": over_kinds(lambda kind: choose_best(planted, kind) - 0.8),
        "eq3-finds-planted": over_kinds(lambda kind: auc.loc[kind, EQ3] - 0.5),
        "eq3-above-activity": over_kinds(lambda kind: auc.loc[kind, EQ3] - auc.loc[kind, ACTIVITY]),
        "contrast-finds-planted": over_kinds(lambda kind: auc.loc[kind, CONTRAST] - 0.5),
    }
    for claim, key in (("eq3", EQ3), ("contrast", CONTRAST)):
        found[f"{claim}-agrees-with-effects"] = {
            name: estimate_agreement(name, key) for name in (NATURAL, PLANTED)
        }
    found["second-set-breaks"] = {
        name: _help_above_half(single.get((name, 2)), harmful) for name in SHORT
    }
    return {
        claim: {model: Evidence(effect, margin_of(claim)) for model, effect in models.items()}
        for claim, models in found.items()
    }


def glue_key(planted, breaking, single, own, whole, done, harmful) -> None:
    """Glue the chapter's findings and the numbers that its prose quotes. single: as for `weigh_claims`; own, whole, done: for `own_claims_table`."""
    found = weigh_claims(planted, single, harmful) | weigh_own_claims(whole, done, harmful)
    summary = summarise_planted(planted)
    best = next(key for key in summary.index if compete(key))
    needed = units_needed(breaking, NATURAL)
    rules = needed[[key for key in needed.index if compete(key)]].dropna()

    def auc(key):
        return f"{summary.loc[key, 'auc'].value:.2f}"

    def agreement(key):
        each = {name: estimate_agreement(name, key).value for name in SHORT}
        return "; ".join(f"ρ {value:.2f} {SHORT[name]}" for name, value in each.items())

    def help_without_second(name):
        scores = single.get((name, 2))
        if scores is None:
            return "none found"
        return f"help {100 * scores['coherent', harmful].value:.0f} %"

    numbers = {
        "eq3-finds-planted": f"right for {auc(EQ3)} of the pairs; chance 0.50",
        "eq3-above-activity": f"right for {auc(EQ3)} of the pairs; importance on harmless requests for {auc(ACTIVITY)}",
        "contrast-finds-planted": f"right for {auc(CONTRAST)} of the pairs; chance 0.50",
        "best-finds-planted": f"{label_of(best)}: right for {auc(best)} of the pairs",
        "eq3-agrees-with-effects": agreement(EQ3),
        "contrast-agrees-with-effects": agreement(CONTRAST),
        **{
            claim: _number_own_claim(len(own[claim].units()), whole, done[claim], harmful)
            for claim in done
        },
        "second-set-breaks": "; ".join(f"{SHORT[n]}: {help_without_second(n)}" for n in SHORT),
    }
    trainings = planted["training"].nunique()
    glue_findings(
        found,
        numbers,
        {"planted models": f"{trainings} trainings of each of three planted models"},
    )
    glue_text(
        auc_eq3=auc(EQ3),
        auc_contrast=auc(CONTRAST),
        auc_activity=auc(ACTIVITY),
        auc_best=auc(best),
        best_rule=label_of(best),
        best_told=tell_best(label_of(best), needed[best], needed[MASK]),
        needed_mask=f"{needed[MASK]:.0f}",
        needed_greedy=shown_count(needed[GREEDY]),
        needed_eq3=shown_count(needed[EQ3]),
        needed_best=f"{rules.min():.0f}",
        needed_best_rule=label_of(rules.idxmin()),
        rules_that_break=len(rules),
        rules=sum(map(compete, DETECTORS)),
        limit=LIMIT,
    )


def _number_own_claim(units, whole: Scores, scores: Scores, harmful) -> str:
    """The number to remember of what the authors of a rule claim."""
    asr, helped = (
        " → ".join(f"{100 * each[measure, harmful].value:.0f}" for each in (whole, scores))
        for measure in ("asr", "coherent")
    )
    return f"{units} units off: attack success {asr} %, help {helped} %"


def tell_best(rule: str, units: float, mask: float) -> str:
    """A sentence on what the best rule for planted neurons does where safety grew. units, mask: what it and the learned mask need."""
    does = f"does not break refusal of the naturally aligned model with {LIMIT} units"
    if not np.isnan(units):
        does = f"breaks refusal of the naturally aligned model with {units:.0f} units"
    return f"The rule that sees planted neurons best, {rule}, {does}; the learned mask needs {mask:.0f}."


def shown_count(units: float) -> str:
    """How many units, or that the limit is not enough."""
    return f"more than {LIMIT}" if np.isnan(units) else f"{units:.0f}"


def draw_poster(summary: pd.DataFrame, needed: pd.Series):
    """The whole answer in one figure: how well each rule finds what was planted, and how many units it needs in a natural model.

    summary: of `summarise_planted`; needed: of `units_needed`.
    """
    keys = [key for key in summary.index if key != MASK]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(5.4, 0.25 * len(keys) + 1.5), sharey=True, width_ratios=(3, 2)
    )
    colours = sns.color_palette(PALETTE)
    for row, key in enumerate(keys):
        estimate, colour = summary.loc[key, "auc"], colours[0] if compete(key) else "#888888"
        left.plot(estimate.interval, [row, row], color=colour, linewidth=1.3)
        left.plot(estimate.value, row, "o", color=colour, markersize=4.5)
        count = needed.get(key, np.nan)
        if np.isnan(count):
            right.text(NEVER, row, "✕", color="#888888", ha="center", va="center", fontsize=8)
        else:
            right.plot([1, count], [row, row], color=colour, linewidth=1.3)
            right.plot(count, row, "o", color=colour, markersize=4.5)
    left.axvline(0.5, color="black", linestyle=":", linewidth=1)
    right.axvline(needed[MASK], color=colours[3], linestyle="--", linewidth=1.2)
    left.set_yticks(range(len(keys)), [label_of(key) for key in keys], fontsize=10)
    left.set(xlabel="planted above decoy\n(dotted: guessing)", xlim=(0.4, 0.8))
    right.set(xlabel=f"units off\n(✕: {LIMIT} fail)", xscale="log", xlim=(1, 2 * LIMIT))
    right.set_xticks([1, 10, 100], ["1", "10", "100"])
    left.set_title("planted safety", fontsize=10)
    right.set_title("natural safety", fontsize=10)
    note = f"mask: {needed[MASK]:.0f}"
    right.text(1.2 * needed[MASK], -1, note, color=colours[3], fontsize=10, ha="left", va="center")
    left.set_ylim(len(keys) - 0.4, -1.6)
    for axes in (left, right):
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="x", labelsize=10)
        axes.xaxis.label.set_size(10)
    figure.tight_layout(w_pad=0.6)
    return left


def shorten(summary: pd.DataFrame, most: int = 5) -> pd.DataFrame:
    """The best rules, Eq 3, its contrast and importance on harmless requests alone, for a slide. summary: of `summarise_planted`."""
    rules = [key for key in summary.index if compete(key)]
    return summary[summary.index.isin({*rules[:most], EQ3, CONTRAST, ACTIVITY})]


def draw_effects(tables: dict[str, pd.DataFrame]):
    """What every unit does alone, sorted: one panel a model. tables: model to its table of units."""
    figure, panels = plt.subplots(1, len(tables), figsize=(7.5, 3), sharey=True, squeeze=False)
    for axes, (name, units) in zip(panels[0], tables.items()):
        groups = units.get("group", pd.Series(["every unit"] * len(units)))
        for i, (group, rows) in enumerate(units.groupby(groups, sort=False)):
            values = np.sort(support_of(rows))[::-1]
            places = np.linspace(0, 100, len(values))
            axes.plot(places, values, color=sns.color_palette(PALETTE)[i], label=group)
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set(title=f"{SHORT[name]} model", xlabel="% of the units, largest first")
        axes.set_yscale("symlog", linthresh=0.1)
        axes.title.set_fontsize(10)
        axes.legend(fontsize=9, frameon=False)
    panels[0, 0].set_ylabel("fall in log odds of refusing (nats)")
    figure.tight_layout()
    return panels[0, 0]


def headline_table(summary: pd.DataFrame, planted: pd.DataFrame, needed: pd.Series) -> pd.DataFrame:
    """Every rule on the planted models and on the natural one, best first, as text."""
    agreement = read_truth("agreement").query("model == @NATURAL and ablation == 'zero'")
    agreement = agreement.set_index("detector")
    passes = planted.groupby("detector")["passes"].mean()
    rows = {}
    for key, row in summary.iterrows():
        precision = row["precision"]
        rows[label_of(key)] = {
            "planted above decoys": lines_of(row["auc"]),
            "planted in its set, %": f"{100 * precision.value:.0f}"
            if isinstance(precision, Estimate)
            else "–",
            "rank correlation with effects": f"{agreement.loc[key, 'spearman']:.2f}",
            "of the top 1 %, found": f"{100 * agreement.loc[key, 'recall']:.0f}",
            "units to break refusal": shown_count(needed[key]).replace("more than ", "> "),
            "cost": "–" if np.isnan(passes[key]) else f"{passes[key]:.0f} ×",
        }
    return pd.DataFrame(rows).T.rename_axis("rule")


def lines_of(estimate: Estimate) -> str:
    """A number and its interval below it, two digits."""
    low, high = estimate.interval
    return f"{estimate.value:.2f}\n[{low:.2f}, {high:.2f}]"


def kinds_table(planted: pd.DataFrame) -> pd.DataFrame:
    """AUC, average precision and precision of every rule by kind of planting, mean over trainings, with what chance gives."""
    measures = {"auc": "AUC", "average precision": "AP", "precision": "precision"}
    means = planted.groupby(["detector", "kind"])[[*measures, "chance precision"]].mean()
    chance = means.xs(EQ3)["chance precision"]
    table = means[[*measures]].unstack("kind").rename(columns=measures)
    order = table["AUC"].mean(axis=1).sort_values(ascending=False).index
    table = table.loc[order].rename(index=label_of)
    table.loc["chance"] = [0.5 if m == "AUC" else chance[kind] for m, kind in table.columns]
    table = table.rename(columns=KINDS, level="kind")
    return table.map(lambda v: "–" if np.isnan(v) else f"{v:.2f}").rename_axis("rule")


def stability_table() -> pd.DataFrame:
    """The share of its first percent that every rule finds again, in percent."""
    found = read_truth("stability")
    found = found[
        ~found["detector"].isin(("control/random", "control/norm"))
    ]  # these read no prompts
    found["on"] = found["model"].map(SHORT) + ", " + found["over"]
    table = 100 * found.pivot(index="detector", columns="on", values="shared")
    order = table.mean(axis=1).sort_values(ascending=False).index
    table = table.loc[order].rename(index=label_of)
    return table.map(lambda value: f"{value:.0f}").rename_axis("rule")


def groups_table(units: pd.DataFrame) -> pd.DataFrame:
    """What units of each group of a planted model do alone, in nats: median, the largest tenth from where, and their sum."""
    support = pd.Series(support_of(units)).groupby(units["group"])
    table = pd.DataFrame(
        {
            "units": support.size(),
            "median": support.median(),
            "largest tenth, from": support.quantile(0.9),
            "sum": support.sum(),
        }
    )
    return table.map(lambda value: f"{value:,.0f}" if value == int(value) else f"{value:.3f}")


def draw_sums(sums: pd.DataFrame):
    """What sets do against the sum of what their units do alone: one panel a model, one dot a rule's set."""
    figure, panels = plt.subplots(1, 2, figsize=(7.5, 3.4))
    for axes, (name, rows) in zip(panels, sums.groupby("model", sort=False)):
        axes.plot(-rows["predicted"], -rows["seen"], "o", markersize=4.5)
        ends = [
            min(axes.get_xlim()[0], axes.get_ylim()[0]),
            max(axes.get_xlim()[1], axes.get_ylim()[1]),
        ]
        axes.plot(ends, ends, ":", color="black", linewidth=1)
        axes.set(title=f"{SHORT[name]} model", xlabel="sum of its units' effects (nats)")
        axes.title.set_fontsize(10)
    panels[0].set_ylabel("effect of the set (nats)")
    figure.tight_layout()
    return panels[0]


def backups_table() -> pd.DataFrame:
    """The disjoint sets that masks found, round by round: how many units, and what the model answers without each alone."""
    found = read_truth("backups")
    rows = {
        (SHORT[row["model"]], row["round"]): {
            "units": f"{row['units']:.0f}",
            "correct help with harm, %": f"{100 * row['harmful correct']:.0f}",
            "refused, %": f"{100 * row['harmful refusal']:.0f}",
            "help with all else, %": f"{100 * row['harmless correct']:.0f}",
        }
        for _, row in found.iterrows()
    }
    return pd.DataFrame(rows).T.rename_axis(["model", "round"])


def key_table(
    results: dict[str, Scores], sets: dict, harmful: str, benign: str, tasks
) -> pd.DataFrame:
    """What the model does with each set of neurons switched off, in percent. results, sets: what is off to `Scores` and to neurons."""
    measures = {
        "attack success": [("asr", harmful)],
        "help with harm": [("coherent", harmful)],
        "over-refusal": [("over_refusal", benign)],
        "capability": [("accuracy", task) for task in tasks],
    }
    rows = {}
    for what, scores in results.items():
        cells = {"units off": f"{len(sets[what].units())}"}
        for title, keys in measures.items():
            rate = estimate_rate([[scores]], keys[0][0], *[name for _, name in keys])
            cells[title] = lines(rate)
        rows[what] = cells
    return pd.DataFrame(rows).T.rename_axis("switched off")


OWN_CLAIMS = {
    "cna-halves-refusal": (
        "cna",
        lambda units: max(1, round(0.001 * (units["kind"] == "ffn").sum())),
    ),
    "fifty-change-the-form": ("perturbation", lambda units: 50),
    "one-head-breaks": ("heads", lambda units: None),
    "three-percent-breaks": ("wanda", lambda units: round(0.03 * len(units))),
}  # claim of a rule's authors -> the rule, and how many of its first units they switch off; all that tie for the first where None


def sets_of_own_claims(model, ranks: pd.DataFrame) -> dict:
    """What the authors of some rules switch off, as neurons. ranks: a table of ranks of the answer key."""
    sets = {}
    for claim, (rule, count) in OWN_CLAIMS.items():
        order, number = ranks.sort_values(rule, kind="stable"), count(ranks)
        first = order[order[rule] == order[rule].min()] if number is None else order[:number]
        places = first[["kind", "layer", "channel"]].itertuples(index=False, name=None)
        sets[claim] = neurons_of(model, places)
    return sets


def weigh_own_claims(whole: Scores, done: dict[str, Scores], harmful: str) -> dict:
    """The evidence for what the authors of some rules claim, on one model. done: claim to what became of requests without its set."""
    found = {}
    for claim, scores in done.items():
        rise = estimate_change([[scores]], [[whole]], "asr", harmful)
        if claim == "cna-halves-refusal":
            values, clusters = outcomes_of(scores, "asr", harmful)
            before, _ = outcomes_of(whole, "asr", harmful)
            half = values - 0.5 - before / 2  # half of the refusals before, less those after
            rise = estimate_mean(half[None, None], clusters)
        if claim == "fifty-change-the-form":
            values, clusters = outcomes_of(scores, "asr", harmful)
            helped, _ = outcomes_of(scores, "coherent", harmful)
            rise = estimate_mean((values - helped)[None, None] - 0.5, clusters)
        found[claim] = {NATURAL: Evidence(rise, margin_of(claim))}
    return found


def own_claims_table(
    own: dict, whole: Scores, done: dict[str, Scores], harmful: str, benign: str
) -> pd.DataFrame:
    """What became of requests with nothing off and without each of these sets, in percent. own: claim to neurons; whole, done: for `weigh_own_claims`."""
    cases = {"nothing": (0, whole)}
    cases |= {label_of(OWN_CLAIMS[c][0]): (len(own[c].units()), s) for c, s in done.items()}
    rows = {
        label: {
            "units off": f"{units}",
            "attack success": lines(scores["asr", harmful]),
            "help with harm": lines(scores["coherent", harmful]),
            "helpful answers": lines(scores["helpful", benign]),
        }
        for label, (units, scores) in cases.items()
    }
    return pd.DataFrame(rows).T.rename_axis("rule")


def rules_table() -> pd.DataFrame:
    """Where every rule is from, what it assumes, and what it must be given besides requests."""
    rows = {
        rule.label: {
            "source": " ".join(filter(None, (rule.source, rule.equation and f"({rule.equation})")))
            or "–",
            "assumes that": rule.assumes,
            "also needs": ", ".join(rule.needs) or "–",
        }
        for rule in DETECTORS.values()
    }
    return pd.DataFrame(rows).T.rename_axis("rule")
