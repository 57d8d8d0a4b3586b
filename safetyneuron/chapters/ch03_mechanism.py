"""Chapter 03, Figures 2 to 4: how much is removed, where it lies, and in which layers."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from safetyneuron.book import labels
from safetyneuron.book import paper as reported
from safetyneuron.book.glue import glue_list, glue_text
from safetyneuron.book.labels import BROKEN, EQ3, RANDOM, SPECIFIC
from safetyneuron.book.plots import PALETTE, draw_bands, rate_panels
from safetyneuron.book.verdicts import WAYS
from safetyneuron.importance.selection import largest_without_foundation, select_without_foundation
from safetyneuron.metrics.outcomes import estimate_rate
from safetyneuron.metrics.suite import evaluate
from safetyneuron.neurons.architecture import ATTENTION, PROJECTIONS
from safetyneuron.neurons.sets import NeuronSet


def sweep(model, tokenizer, suite, harmful, general, fractions, draws):
    """Rates against the share of neurons deactivated, from one importance pass (Figure 2).

    Parameters
    ----------
    harmful, general : ImportanceProfile
        Measured on harmful and on general prompts.
    fractions : sequence of float
        Shares of all neurons.
    draws : int
        Random sets per share, whose mean is taken.

    Returns
    -------
    pandas.DataFrame
        Columns condition, fraction, measure, set, rate; fraction 0 is the whole model. The second set ends at the share
        where foundation neurons leave too few, its random match also where too few units lie outside it.
    """
    rows = [("whole", 0.0, *key, rate) for key, rate in evaluate(model, tokenizer, suite).items()]
    largest = largest_without_foundation(harmful, general)
    for fraction in fractions:
        sets = {EQ3: [harmful.select(fraction=fraction)]}
        if fraction <= largest:
            specific = select_without_foundation(harmful, general, fraction)
            sets |= {
                SPECIFIC: [specific],
                RANDOM: NeuronSet.random_draws(specific, draws),
            }
        for condition, drawn in sets.items():
            if not drawn:
                continue
            results = [evaluate(model, tokenizer, suite, without=neurons) for neurons in drawn]
            rows += [
                (condition, fraction, *key, estimate_rate([results], *key)) for key in results[0]
            ]
    return pd.DataFrame(rows, columns=["condition", "fraction", "measure", "set", "rate"])


def onset_and_collapse(table, condition, measure):
    """The smallest shares at which harm leaves the whole model's interval, and at which the mechanism counts as broken.

    Onset: the lower end of the 95 % interval lies above the upper end of the whole model's. Collapse: the rate is at
    least `BROKEN`. NaN where no share does it.
    """
    rates = table[table["measure"] == measure].sort_values("fraction")
    before = rates[rates["condition"] == "whole"]["rate"].iloc[0]
    rates = rates[rates["condition"] == condition]
    onset = rates[[rate.interval[0] > before.interval[1] for rate in rates["rate"]]][
        "fraction"
    ].min()
    collapse = rates[[rate.value >= BROKEN for rate in rates["rate"]]]["fraction"].min()
    return onset, collapse


def structures(neurons):
    """Where a set lies, by projection and for attention and feed-forward together (Figure 3).

    Returns
    -------
    pandas.DataFrame
        Index structure; columns neurons, share of the set, share of the structure's rows, enrichment over chance
        (1 where the structure holds as much of the set as of the model's neurons), and share of the set's functional
        units that have a row or column there.
    """
    members = {p: [p] for p in PROJECTIONS} | {
        "attention": ATTENTION,
        "feed-forward": [p for p in PROJECTIONS if p not in ATTENTION],
    }
    rows = {}
    for name, projections in members.items():
        inside = len(neurons.only(projections))
        share = inside / sum(neurons.masks[p].numel() for p in projections)
        rows[name] = {
            "neurons": inside,
            "share of the set": neurons.share_in(projections),
            "share of its rows": share,
            "enrichment": share / neurons.share,
            "share of its units": neurons.share_in(projections, units=True),
        }
    return pd.DataFrame(rows).T.rename_axis("structure").astype({"neurons": int})


def layers(neurons):
    """The same by layer: index layer, from 1; columns neurons, share of its rows, enrichment over chance."""
    counts = sum(mask.sum(1) for mask in neurons.masks.values()).tolist()
    width = sum(mask.shape[1] for mask in neurons.masks.values())
    rows = {
        i: {"neurons": n, "share of its rows": n / width, "enrichment": n / width / neurons.share}
        for i, n in enumerate(counts, 1)
    }
    return pd.DataFrame(rows).T.rename_axis("layer").astype({"neurons": int})


def places(sets, count):
    """`structures` or `layers` of every set as one table. sets: model to way of choosing to NeuronSet.

    Returns
    -------
    pandas.DataFrame
        Index model, condition, and structure or layer.
    """
    return pd.concat(
        {(m, c): count(neurons) for m, chosen in sets.items() for c, neurons in chosen.items()},
        names=["model", "condition"],
    )


def depth_sweep(model, tokenizer, suite, neurons):
    """Rates when only the neurons up to layer L are deactivated, and only those from layer L on (Figure 4).

    Returns
    -------
    pandas.DataFrame
        Columns direction, layer, neurons, measure, set, rate; layer 0 is the whole model.
    """
    count = len(neurons.masks["q"])
    parts = [("layers 1 to L", layer, neurons.within(1, layer)) for layer in range(1, count + 1)]
    parts += [
        ("layers L to the last", layer, neurons.within(layer, count))
        for layer in range(1, count + 1)
    ]
    rows = [("whole", 0, 0, *key, rate) for key, rate in evaluate(model, tokenizer, suite).items()]
    for direction, layer, part in parts:
        rates = evaluate(model, tokenizer, suite, without=part)
        rows += [(direction, layer, len(part), *key, rate) for key, rate in rates.items()]
    return pd.DataFrame(rows, columns=["direction", "layer", "neurons", "measure", "set", "rate"])


def broken_at(table, direction):
    """The first layer L at which attack success reaches `BROKEN` going forward, the last going backward; NaN if none."""
    rates = table[(table["direction"] == direction) & (table["measure"] == "asr")]
    layers_broken = rates[[rate.value >= BROKEN for rate in rates["rate"]]]["layer"]
    return layers_broken.min() if direction == "layers 1 to L" else layers_broken.max()


def onsets_table(tables, name):
    """Shares (%) at the onset of harm and at collapse: the paper's words, then every model and condition here."""

    def text(share):
        return "–" if share != share else f"{share:g}"

    rows = {
        ("paper", model): {"onset": text(r["onset"]), "collapse": text(r["collapse"])}
        for model, r in reported.MECHANISM.items()
    }
    for model, table in tables.items():
        for condition in (labels.EQ3, labels.SPECIFIC, labels.RANDOM):
            onset, collapse = onset_and_collapse(table[table["set"] == name], condition, "asr")
            _, coherent = onset_and_collapse(table[table["set"] == name], condition, "coherent")
            row = {"onset": onset, "collapse": collapse, "collapse, well-formed answers": coherent}
            rows[f"here: {model}", condition] = {
                column: text(round(100 * share, 2)) for column, share in row.items()
            }
    return pd.DataFrame(rows).T.fillna("–").rename_axis(["share of neurons (%)", ""])


def places_table(places):
    """Counts, shares and enrichment by structure: one block of rows per model, of columns per way of choosing.

    places: `mechanism.places` by `structures`.
    """
    formats = {
        "neurons": "{:d}",
        "share of the set": "{:.0%}",
        "share of its rows": "{:.1%}",
        "enrichment": "{:.1f}",
        "share of its units": "{:.0%}",
    }
    text = pd.DataFrame(
        {column: places[column].map(form.format) for column, form in formats.items()}
    )
    table = text.unstack("condition", sort=False).swaplevel(axis=1)
    return table[
        [(condition, column) for condition in table.columns.unique(0) for column in formats]
    ]


def sweep_curves(tables, measures):
    """Rates with their 95 % bands against the share deactivated: one row of panels per model, one column per measure.

    tables: model name to the result of `mechanism.sweep`; measures: (measure, set) to panel title.
    """

    def draw(axes, chosen):
        """One panel: the conditions, the whole model as a dotted line, shares on a logarithmic axis."""
        draw_bands(axes, chosen[chosen["condition"] != "whole"], "condition", "fraction", 100)
        axes.axhline(
            100 * chosen[chosen["condition"] == "whole"]["rate"].iloc[0].value,
            color="grey",
            linestyle=":",
            label="whole model",
        )
        axes.set(xscale="log")
        axes.xaxis.set_major_formatter("{x:g}")

    return rate_panels(tables, measures, draw, "neurons deactivated (%)")


def depth_curves(tables, name):
    """Attack success against layer L for both directions, one panel per model. tables: model to `mechanism.depth_sweep`."""
    figure, panels = plt.subplots(
        1, len(tables), figsize=(max(6, 4 * len(tables)), 3), sharey=True, squeeze=False
    )
    for axes, (model, table) in zip(panels[0], tables.items()):
        chosen = table[(table["measure"] == "asr") & (table["set"] == name)]
        draw_bands(axes, chosen[chosen["direction"] != "whole"], "direction", "layer")
        axes.axhline(
            100 * chosen[chosen["direction"] == "whole"]["rate"].iloc[0].value,
            color="grey",
            linestyle=":",
            label="whole model",
        )
        axes.set(xlabel="layer L", ylim=(-4, 104), title=model.removeprefix("organism/"))
    panels[0, 0].set(ylabel="attack success (%)")
    panels[0, 0].legend(fontsize=8)
    return panels[0, 0]


def enrichment_bars(by_structure, by_layer):
    """Enrichment over chance by structure and by layer, one bar per set, one row of panels per model.

    Both: results of `mechanism.places`.
    """
    models = by_structure.index.unique("model")
    figure, panels = plt.subplots(len(models), 2, figsize=(9, 3.2 * len(models)), squeeze=False)
    for row, model in zip(panels, models):
        for axes, table in zip(row, (by_structure, by_layer)):
            table["enrichment"].xs(model).unstack("condition", sort=False).plot.bar(
                ax=axes, color=sns.color_palette(PALETTE), legend=False, width=0.75
            )
            axes.axhline(1, color="grey", linestyle=":")
            axes.tick_params(axis="x", labelrotation=45 if axes is row[0] else 0)
            axes.grid(axis="x", visible=False)
            axes.set_title(model.removeprefix("organism/"), fontsize=9)
        row[0].set(ylabel="enrichment over chance", xlabel="")
        row[1].set(xlabel="layer")
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(),
        loc="upper center",
        bbox_to_anchor=(0.5, 0.02),
        ncols=2,
        frameon=False,
    )
    figure.tight_layout()
    return panels[0, 0]


def glue_resilience(tables, name):
    """Glue what Figure 2 shows: onset, collapse and the highest attack success of both ways of choosing, for every model."""
    parts = [
        f"{m}, {c}: {_resilience(t[t['set'] == name], c)}"
        for m, t in tables.items()
        for c in (labels.EQ3, labels.SPECIFIC)
    ]
    glue_list("verdict_resilience", [f"{part}." for part in parts])
    first = next(iter(tables.values()))
    found = {
        label: onset_and_collapse(first[first["set"] == name], c, "asr")
        for label, c in WAYS.items()
    }
    glue_text(**{f"onset_{label}": _share(onset) for label, (onset, _) in found.items()})
    glue_text(**{f"collapse_{label}": _share(collapse) for label, (_, collapse) in found.items()})


def _resilience(table, condition):
    onset, collapse = onset_and_collapse(table, condition, "asr")
    rates = table[(table["condition"] == condition) & (table["measure"] == "asr")]
    peak = rates.loc[rates["rate"].map(lambda rate: rate.value).idxmax()]
    coherent = table[
        (table["condition"] == condition)
        & (table["measure"] == "coherent")
        & (table["fraction"] == peak["fraction"])
    ]["rate"].iloc[0]
    seen = "seen" if collapse < 0.01 else "not seen"
    return (
        f"harm sets in {_share(onset)} and safety collapses {_share(collapse)}, so that fewer than one percent suffice is {seen}; attack success"
        f" is highest at {peak['fraction']:.2%}, {peak['rate'].percent} %, of which {coherent.percent} % of the requests get a well-formed answer"
    )


def _share(fraction):
    return "at no share tried" if fraction != fraction else f"at {fraction:.2%} of the neurons"


def glue_places(by_structure, by_layer):
    """Glue where the neurons lie: results of `mechanism.places` by `structures` and by `layers`."""
    parts = []
    for (model, name), counts in by_layer["neurons"].groupby(
        level=["model", "condition"], sort=False
    ):
        attention = by_structure.loc[model, name, "attention"]
        half = counts.iloc[: len(counts) // 2].sum() / counts.sum()
        rows, units = (
            "seen" if attention[share] > 0.5 else "not seen"
            for share in ("share of the set", "share of its units")
        )
        parts.append(
            f"{model}, {name}: attention holds {attention['share of the set']:.0%} of the set's rows and columns, {attention['enrichment']:.1f} times what"
            f" chance gives, and {attention['share of its units']:.0%} of its functional units, so a majority in attention is {rows} in rows and {units} in"
            f" units; the first half of the layers holds {half:.0%}"
        )
    glue_list("verdict_places", [f"{part}." for part in parts])
    first = by_structure.index.get_level_values("model")[0]
    for label, name in WAYS.items():
        attention = by_structure.loc[first, name, "attention"]
        glue_text(
            **{
                f"attention_{label}": f"{attention['share of the set']:.0%}, {attention['enrichment']:.1f} times chance ({attention['share of its units']:.0%} of the units)"
            }
        )


def glue_depth(tables):
    """Glue the layers at which safety breaks, for every model."""
    parts = []
    for model, table in tables.items():
        forward, backward = (
            broken_at(table, direction) for direction in ("layers 1 to L", "layers L to the last")
        )
        count = table["layer"].max()
        from_front = (
            "not at all"
            if forward != forward
            else f"with the first {forward:.0f} of {count} layers"
        )
        from_back = (
            "not at all" if backward != backward else f"with layers {backward:.0f} to {count}"
        )
        parts.append(
            f"{model}: safety collapses {from_front} when layers are taken from the front, and {from_back} from the back"
        )
        if len(parts) == 1:
            glue_text(from_front=from_front, from_back=from_back)
    glue_list("verdict_depth", [f"{part}." for part in parts])
