"""Chapter 03, Figures 2 to 4: how much is removed, where it lies, and in which layers."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch

from safetyneuron.book import paper as reported
from safetyneuron.book.claims import margin_of
from safetyneuron.book.glue import glue_text
from safetyneuron.book.labels import BROKEN, EQ3, SMALL, SPECIFIC
from safetyneuron.book.ledger import glue_findings, name_runs
from safetyneuron.book.plots import CLASS_NAMES, PALETTE, draw_bands, label_curves
from safetyneuron.book.tables import count_classes
from safetyneuron.metrics.estimates import estimate_exact, estimate_mean, score_best
from safetyneuron.metrics.outcomes import (
    estimate_change,
    estimate_rate,
    outcomes_of,
    rank_chance,
    rates_by_run,
)
from safetyneuron.metrics.verdict import Evidence
from safetyneuron.neurons.architecture import ATTENTION, PROJECTIONS
from safetyneuron.neurons.sets import NeuronSet

WAYS = {"eq3": EQ3, "specific": SPECIFIC}  # part of a glued name -> way of choosing
WHOLE, FIRST_HALF = "whole", "Eq 3's larger set, first half of the layers"
FRONT, BACK = "layers 1 to L", "layers L to the last"
HARM = {"asr": "no refusal phrase", "coherent": "help with harm"}


def tabulate(runs, names):
    """Long table of rates over trainings. runs: tuple of values of `names` to `Runs`.

    Returns
    -------
    pandas.DataFrame
        Columns `names`, measure, set, rate, by training; points that not every training reaches are left out.
    """
    most = max(len(trainings) for trainings in runs.values())
    rows = [
        (*point, *key, estimate_rate(trainings, *key), rates_by_run(trainings, *key)[:, 0].tolist())
        for point, trainings in runs.items()
        if len(trainings) == most
        for key in trainings[0][0]
    ]
    return pd.DataFrame(rows, columns=[*names, "measure", "set", "rate", "by training"])


def tabulate_sweep(whole, swept):
    """`tabulate` of Figure 2: columns condition and fraction, of which 0 is the whole model. swept: (way, fraction) to `Runs`."""
    return tabulate({(WHOLE, 0.0): whole} | swept, ["condition", "fraction"])


def tabulate_depth(whole, depths):
    """`tabulate` of Figure 4: columns condition, direction and layer, of which 0 is the whole model. depths: (way, direction, layer) to `Runs`."""
    return tabulate({(WHOLE, WHOLE, 0): whole} | depths, ["condition", "direction", "layer"])


def onset_and_collapse(table, condition, measure):
    """The smallest shares at which harm leaves the whole model's interval, and at which refusal counts as gone.

    Onset: the lower end of the 95 % interval lies above the upper end of the whole model's. Collapse: the rate is at
    least `BROKEN`. NaN where no share does it.
    """
    rates = table[table["measure"] == measure].sort_values("fraction")
    before = rates[rates["condition"] == WHOLE]["rate"].iloc[0]
    rates = rates[rates["condition"] == condition]
    above = [rate.interval[0] > before.interval[1] for rate in rates["rate"]]
    gone = [rate.value >= BROKEN for rate in rates["rate"]]
    return rates[above]["fraction"].min(), rates[gone]["fraction"].min()


def onsets_table(tables):
    """Shares (%) at the onset of harm and at collapse: the paper's words, then every model and way of choosing here."""
    rows = {}
    for model, table in tables.items():
        for way in WAYS.values():
            onset, collapse = onset_and_collapse(table, way, "asr")
            _, helps = onset_and_collapse(table, way, "coherent")
            found = {"onset": onset, "collapse": collapse, "help with 80 %": helps}
            rows[f"here: {model}", way] = {
                column: "never" if share != share else f"{100 * share:.3g}"
                for column, share in found.items()
            }
    for model, read in reported.MECHANISM.items():
        rows["paper", model] = {column: f"{read[column]:g}" for column in ("onset", "collapse")}
    return pd.DataFrame(rows).T.fillna("not reported").rename_axis(["share of neurons (%)", ""])


def share_classes(swept, way, name):
    """Share of every class of answers at each share of neurons, over all trainings: label of the share to class to `Rate`."""
    points = {f"{100 * s:.3g} %": runs for (w, s), runs in swept.items() if w == way}
    return count_classes(points, name)


def glue_largest(classes):
    """Glue the classes of the answers at the largest share. classes: of `share_classes`."""
    label, shares = list(classes.items())[-1]
    texts = [f"{CLASS_NAMES.get(kind, kind)} {100 * r.value:.0f} %" for kind, r in shares.items()]
    glue_text(largest_share=label, largest_classes=", ".join(texts))


def structures(neurons):
    """Where a set lies, by projection and for attention and feed-forward together (Figure 3).

    Returns
    -------
    pandas.DataFrame
        Index structure; columns neurons, share of the set, enrichment over chance (1 where the structure holds as much of the
        set as of the model's neurons), and share and enrichment of the set's functional units that have a row or column there.
    """
    members = {p: [p] for p in PROJECTIONS} | {
        "attention": ATTENTION,
        "feed-forward": [p for p in PROJECTIONS if p not in ATTENTION],
    }
    everything = NeuronSet({p: torch.ones_like(mask) for p, mask in neurons.masks.items()})
    rows = {}
    for name, projections in members.items():
        share, units = (neurons.share_in(projections, units=each) for each in (False, True))
        rows[name] = {
            "neurons": len(neurons.only(projections)),
            "share of the set": share,
            "enrichment": share / everything.share_in(projections),
            "share of its units": units,
            "enrichment of units": units / everything.share_in(projections, units=True),
        }
    return pd.DataFrame(rows).T.rename_axis("structure").astype({"neurons": int})


def layers(neurons):
    """The same by layer: index layer, from 1; columns neurons, enrichment, units, enrichment of units."""
    rows, units = neurons.masks.values(), neurons.units()
    kinds = units.kinds.values()
    counts = {
        "neurons": (sum(mask.sum(1) for mask in rows), sum(m.shape[1] for m in rows), neurons),
        "units": (sum(mask.sum(1) for mask in kinds), sum(m.shape[1] for m in kinds), units),
    }
    table = {}
    for what, (inside, width, chosen) in counts.items():
        enriched = "enrichment" if what == "neurons" else "enrichment of units"
        table |= {what: inside, enriched: inside / width / chosen.share}
    return pd.DataFrame(table, index=range(1, len(neurons.masks["q"]) + 1)).rename_axis("layer")


def count_places(sets, count):
    """`structures` or `layers` of every set as one table. sets: model to way of choosing to one NeuronSet a training.

    Returns
    -------
    pandas.DataFrame
        Index model, condition, training, and structure or layer.
    """
    tables = {
        (model, way, training): count(neurons)
        for model, ways in sets.items()
        for way, trainings in ways.items()
        for training, neurons in enumerate(trainings)
    }
    return pd.concat(tables, names=["model", "condition", "training"])


def places_table(places):
    """Share of every structure in rows and in units, and enrichment in units: mean over trainings, and the range where there are several.

    places: `count_places` by `structures`.
    """
    columns = {
        "rows, %": ("share of the set", 100, "{:.0f}"),
        "units, %": ("share of its units", 100, "{:.0f}"),
        "units, times chance": ("enrichment of units", 1, "{:.1f}"),
    }
    groups = places.groupby(level=["model", "condition", "structure"], sort=False)
    text = pd.DataFrame({t: groups[c].agg(_span(*how)) for t, (c, *how) in columns.items()})
    table = text.unstack("condition", sort=False).swaplevel(axis=1)
    order = [(way, title) for way in table.columns.unique(0) for title in columns]
    table = table[order]
    return table.droplevel("model") if len(table.index.unique("model")) == 1 else table


def _span(scale, form):
    """The function that writes the mean of several values, and their range on a second line."""

    def write(values):
        ends = [form.format(scale * end) for end in (values.min(), values.max())]
        mean = form.format(scale * values.mean())
        return mean if ends[0] == ends[1] else f"{mean}\n{ends[0]} to {ends[1]}"

    return write


def depth_of_collapse(table, condition, direction):
    """The first layer L at which attack success reaches `BROKEN` going forward, the last going backward; NaN if none."""
    rates = table[(table["direction"] == direction) & (table["measure"] == "asr")]
    rates = rates[rates["condition"] == condition]
    gone = rates[[rate.value >= BROKEN for rate in rates["rate"]]]["layer"]
    return gone.min() if direction == FRONT else gone.max()


def depth_table(tables):
    """How many layers, from the front and from the back, must lose their neurons before refusal is gone: paper and here."""
    columns, rows = ("from the front", "from the back"), {}
    for model, table in tables.items():
        for way in WAYS.values():
            rows[f"here: {model}", way] = dict(zip(columns, count_layers(table, way)))
    for model, read in reported.MECHANISM.items():
        front = f"{read['layers']} of {reported.MECHANISM_LAYERS}"
        rows["paper", model] = dict(zip(columns, (front, "nearly all")))
    return pd.DataFrame(rows).T.rename_axis(["layers without the set", ""])


def count_layers(table, way):
    """From the front and from the back: how many layers must lose the set before refusal is gone, as text."""
    count = table["layer"].max()
    if not (table["condition"] == way).any():  # too few neurons for a set of this size
        return "–", "–"
    front, back = (depth_of_collapse(table, way, direction) for direction in (FRONT, BACK))
    numbers = (front, count + 1 - back)
    return tuple(
        f"not even all {count} layers" if n != n else f"{n:.0f} of {count}" for n in numbers
    )


def draw_sweep(tables, random, fraction, name, task):
    """What becomes of refusal, of help with harm and of capability against the share deactivated: one row a model, one panel a way.

    tables: model to `tabulate_sweep`; random: model to way to `Runs` of random sets of the share `fraction`.
    """
    lines = {(measure, name): title for measure, title in HARM.items()}
    lines |= {("accuracy", task): "capability"}
    figure, panels = _panels(len(tables), len(WAYS))
    for row, (model, table) in zip(panels, tables.items()):
        for axes, way in zip(row, WAYS.values()):
            shown = table[table["condition"] == way]
            keys = list(zip(shown["measure"], shown["set"]))
            shown = shown.assign(line=[lines.get(key) for key in keys])
            order = shown["line"].map({title: i for i, title in enumerate(lines.values())})
            draw_bands(axes, shown.assign(order=order).sort_values(["order", "fraction"]), "line", "fraction", 100)  # fmt: skip
            values = 100 * rates_by_run(random[model][way], "asr", name).flatten()
            axes.scatter([100 * fraction] * len(values), values, s=5, color="grey", zorder=0)
            axes.set(xscale="log", title=f"{model.removeprefix('organism/')}: {way}")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
    for axes in panels[-1]:
        axes.set(xlabel="neurons deactivated (%)")
    for axes in panels.flat:
        label_curves(axes)
    figure.tight_layout()
    return panels[0, 0]


def draw_depth(tables, name):
    """Refusal and help against layer L for both directions: one row a model, one panel a way. tables: model to `tabulate_depth`."""
    figure, panels = _panels(len(tables), len(WAYS))
    for row, (model, table) in zip(panels, tables.items()):
        for axes, way in zip(row, WAYS.values()):
            shown = table[(table["condition"] == way) & (table["set"] == name)]
            ends = zip(shown["direction"], shown["measure"])
            line = [f"{direction}:\n{HARM[measure]}" for direction, measure in ends]
            draw_bands(axes, shown.assign(line=line), "line", "layer")
            axes.set(title=f"{model.removeprefix('organism/')}: {way}")
    for axes in panels[-1]:
        axes.set(xlabel="layer L")
    for axes in panels.flat:
        label_curves(axes, gap=0.13)  # two lines each
    figure.tight_layout()
    return panels[0, 0]


def _panels(rows, columns):
    """A grid of panels in percent on one scale."""
    figure, panels = plt.subplots(
        rows, columns, figsize=(9.5, 3.6 * rows), sharex=True, sharey=True, squeeze=False
    )
    for row in panels:
        row[0].set(ylabel="%", ylim=(-4, 104))
    return figure, panels


def draw_places(by_structure, by_layer):
    """Share in attention, in rows and in units, beside chance; enrichment by layer. One row of panels a model, one dot a training.

    Both: results of `count_places`.
    """
    models = by_structure.index.unique("model")
    size = (9.5, 3.2 * len(models))
    figure, panels = plt.subplots(len(models), 2, figsize=size, squeeze=False)
    for (left, right), model in zip(panels, models):
        _draw_shares(left, by_structure.xs((model, "attention"), level=("model", "structure")))
        _draw_layers(right, by_layer.loc[model, "enrichment of units"])
        left.set_title(model.removeprefix("organism/"), fontsize=9)
    figure.tight_layout()
    return panels[0, 0]


def _draw_shares(axes, attention):
    """Dots for the share of each set in attention, in both counts; a cross where chance would put it."""
    counts = {
        "rows": ("share of the set", "enrichment"),
        "units": ("share of its units", "enrichment of units"),
    }
    rows = [(way, count) for way in WAYS.values() for count in counts]
    for i, (way, count) in enumerate(rows):
        share, enrichment = (
            attention[column].xs(way, level="condition") for column in counts[count]
        )
        colour = sns.color_palette(PALETTE)[list(WAYS.values()).index(way)]
        axes.scatter(
            100 * share,
            [i] * len(share),
            color=colour,
            alpha=0.8,
            linewidth=0,
            label="_each training",
        )
        axes.plot(100 * share.mean(), i, "|", color="black", markersize=14, label="_mean")
        axes.plot(
            100 * (share / enrichment).mean(),
            i,
            "x",
            color="grey",
            markersize=7,
            label="_by chance",
        )
    axes.axvline(50, color="grey", linestyle=":", linewidth=1)
    above = dict(xycoords=("data", "axes fraction"), xytext=(3, -3), textcoords="offset points")
    axes.annotate("half", (50, 1), va="top", color="grey", fontsize=8, **above)
    axes.set_yticks(range(len(rows)), [f"{way}, {count}" for way, count in rows])
    axes.set(xlabel="share in attention (%); cross: chance", xlim=(0, 100))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


def _draw_layers(axes, enrichment):
    """Enrichment over chance by layer, a line a way through the means and a dot a training."""
    for i, way in enumerate(WAYS.values()):
        table = enrichment.loc[way].unstack("layer")
        colour = sns.color_palette(PALETTE)[i]
        for _, row in table.iterrows():
            axes.scatter(
                row.index,
                row,
                s=12,
                color=colour,
                alpha=0.5,
                linewidth=0,
                label=f"_{way}, one training",
            )
        name = way.replace(" without", "\nwithout")
        axes.plot(table.columns, table.mean(), color=colour, label=name)
    axes.axhline(1, color="grey", linestyle=":", linewidth=1)
    axes.set(xlabel="layer", ylabel="units, times chance", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    label_curves(axes, gap=0.13)  # two lines


def best_small(swept, way, measure, name):
    """Outcomes (trainings, 1, items) under the best share of at most one percent, chosen on the other half of the items; and their clusters."""
    small = [runs for (w, share), runs in swept.items() if w == way and share <= SMALL]
    count = max(map(len, small))
    values = [
        score_best(np.array([outcomes_of(runs[t][0], measure, name)[0] for runs in small if len(runs) == count]))
        for t in range(count)
    ]  # fmt: skip
    return np.array(values)[:, None], outcomes_of(small[0][0][0], measure, name)[1]


def weigh_claims(swept, depths, judged, random, attention, name):
    """The evidence for each claim of the chapter on one model.

    Parameters
    ----------
    swept, depths : dict
        (way, share) and (way, direction, layer) to `Runs`.
    judged, random : dict
        Set to `Runs` without it, and without random ones like it; the set in the first half of the layers too.
    attention : pandas.DataFrame
        Row attention of `structures` of Eq 3's set in every training.
    name : str
        The set that is asked.
    """
    found = {}
    for key, way, measure, bar in (
        ("small-share-breaks", EQ3, "asr", BROKEN),
        ("small-share-helps", EQ3, "coherent", 0.5),
        ("small-rest-breaks", SPECIFIC, "asr", BROKEN),
    ):
        values, clusters = best_small(swept, way, measure, name)
        chance = rank_chance(judged[way], random[way], measure, name)
        found[key] = Evidence(estimate_mean(values - bar, clusters), margin_of(key), chance)
    for key, column in (
        ("attention-rows", "share of the set"),
        ("attention-units", "share of its units"),
    ):
        found[key] = Evidence(estimate_exact(attention[column] - 0.5), margin_of(key))
    front, back = halves(depths)
    effect = estimate_change(front, back, "asr", name)
    chance = rank_chance(judged[FIRST_HALF], random[FIRST_HALF], "asr", name)
    found["front-carries"] = Evidence(effect, margin_of("front-carries"), chance)
    return found


def halves(depths):
    """`Runs` without Eq 3's neurons in the first half of the layers, and in the second."""
    half = max(layer for _, _, layer in depths) // 2
    return depths[EQ3, FRONT, half], depths[EQ3, BACK, half + 1]


def glue_mechanism(tables, swept, depths, judged, random, by_structure, families, name):
    """Glue the findings of the chapter, and every value of its closing table.

    tables: model to `tabulate_sweep` and `tabulate_depth`; swept to random: model to what `weigh_claims` takes.
    """
    attention = by_structure.xs("attention", level="structure")
    evidence = {
        m: weigh_claims(swept[m], depths[m], judged[m], random[m], attention.loc[m, EQ3], name)
        for m in families
    }
    first = next(iter(families))
    sweep, depth = tables[first]
    values = {
        (way, measure): f"{100 * best_small(swept[first], way, measure, name)[0].mean():.0f}"
        for way in WAYS.values()
        for measure in HARM
    }
    chance = 100 * estimate_rate(random[first][EQ3], "asr", name).value
    shares = attention.loc[first, EQ3].mean()
    front, back = (100 * estimate_rate(runs, "asr", name).value for runs in halves(depths[first]))
    by_chance = shares["share of its units"] / shares["enrichment of units"]
    numbers = {
        "small-share-breaks": f"attack success {values[EQ3, 'asr']} % at the best share; random neurons {chance:.0f} %",
        "small-share-helps": f"help with {values[EQ3, 'coherent']} % of the requests at the best share",
        "small-rest-breaks": f"attack success {values[SPECIFIC, 'asr']} %, help {values[SPECIFIC, 'coherent']} %, each at its best share",
        "attention-rows": f"{100 * shares['share of the set']:.0f} % lie in attention",
        "attention-units": f"{100 * shares['share of its units']:.0f} % lie in attention; {100 * by_chance:.0f} % by chance",
        "front-carries": f"attack success {front:.0f} % without those of the first half, {back:.0f} % without those of the second",
    }
    by_claim = {key: {m: found[key] for m, found in evidence.items()} for key in numbers}
    glue_findings(by_claim, numbers, name_runs(families))
    for label, way in WAYS.items():
        onset, collapse = (_share(share) for share in onset_and_collapse(sweep, way, "asr"))
        glue_text(**{f"onset_{label}": onset, f"collapse_{label}": collapse})
        where = attention.loc[first, way].mean()
        texts = [f"{100 * where[c]:.0f} %" for c in ("share of the set", "share of its units")]
        glue_text(**{f"attention_{label}": f"{texts[0]} of the rows, {texts[1]} of the units"})
        from_front, from_back = count_layers(depth, way)
        glue_text(**{f"from_front_{label}": from_front, f"from_back_{label}": from_back})
    glue_text(layer_count=depth["layer"].max())


def _share(fraction):
    return "at no share tried" if fraction != fraction else f"at {100 * fraction:.3g} %"
