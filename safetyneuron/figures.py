"""Plots of the book: one function a figure; each takes data and returns Axes."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from safetyneuron import patching
from safetyneuron.neurons.architecture import PROJECTIONS
from safetyneuron.metrics.rates import Rate

PALETTE = "colorblind"
CLASS_COLOURS = ("#56b4e9", "#f0e442", "#d55e00", "#cc79a7", "#bbbbbb")  # of refusal, verdict, correct and wrong help, other
CLASS_NAMES = {"correct": "correct help", "wrong": "wrong help"}


def set_style():
    """Seaborn's white grid and colour-blind palette, for every figure of the book."""
    sns.set_theme(style="whitegrid", palette=PALETTE, rc={"figure.figsize": (7, 3.2), "figure.dpi": 120, "savefig.bbox": "tight"})


def training_curve(curves):
    """Loss against step, one line per stage. curves: stage to list of {step, loss}."""
    rows = pd.concat([pd.DataFrame(points).assign(stage=stage) for stage, points in curves.items()])
    axes = sns.lineplot(rows, x="step", y="loss", hue="stage", style="stage")
    axes.set(yscale="log", xlabel="training step", ylabel="loss on answers (nats per token)")
    return axes


def survival_curve(profile):
    """Share of neurons whose minimum importance is at least ε, one line per projection."""
    _, axes = plt.subplots()
    for projection in PROJECTIONS:
        values = profile.minimum[projection].flatten().sort().values
        left = 1 - pd.Series(range(len(values))) / len(values)
        axes.plot(values, 100 * left, label=projection)
    axes.set(xscale="log", yscale="log", xlabel="threshold ε (change of the sub-block's output)", ylabel="neurons with minimum ≥ ε (%)")
    axes.legend(title="projection", ncols=2)
    return axes


def counts_heatmap(neurons):
    """Share of each layer's rows in the set, layer against projection, in percent."""
    shares = {p: 100 * mask.float().mean(1).numpy() for p, mask in neurons.masks.items()}
    axes = sns.heatmap(pd.DataFrame(shares).T, annot=True, fmt=".1f", cmap="viridis", cbar_kws={"label": "% of the rows"})
    axes.set(xlabel="layer", ylabel="projection")
    axes.set_yticklabels(axes.get_yticklabels(), rotation=0)
    return axes


def condition_bars(table):
    """Rates with their intervals: one group of bars per measure, one bar per condition.

    table: data frame with columns measure, condition, rate (a `Rate`), ordered as they should appear.
    """
    measures, conditions = table["measure"].unique(), table["condition"].unique()
    _, axes = plt.subplots(figsize=(8, 3.6))
    width = 0.8 / len(conditions)
    for i, condition in enumerate(conditions):
        rates = table[table["condition"] == condition].set_index("measure")["rate"].reindex(measures)
        values = [100 * rate.value for rate in rates]
        errors = [[100 * (r.value - r.interval[0]) for r in rates], [100 * (r.interval[1] - r.value) for r in rates]]
        places = [m + (i - (len(conditions) - 1) / 2) * width for m in range(len(measures))]
        axes.bar(places, values, width, yerr=errors, capsize=2, label=condition, color=sns.color_palette(PALETTE)[i])
    axes.set(ylabel="%", ylim=(0, 105))
    axes.set_xticks(range(len(measures)), measures)
    axes.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    axes.grid(axis="x", visible=False)
    return axes


def class_bars(classes):
    """Shares of the classes of answers as stacked bars, one per row. classes: row to the result of `sort_answers`."""
    _, axes = plt.subplots(figsize=(8, 0.9 + 0.38 * len(classes)))
    names = list(dict.fromkeys(name for shares in classes.values() for name in shares))
    left = dict.fromkeys(classes, 0.0)
    for name, colour in zip(names, CLASS_COLOURS):
        widths = [100 * shares[name].value for shares in classes.values()]
        bars = axes.barh(list(classes), widths, left=list(left.values()), label=CLASS_NAMES.get(name, name), color=colour)
        axes.bar_label(bars, [f"{w:.0f}" if w >= 4 else "" for w in widths], label_type="center", fontsize=8)
        left = {row: left[row] + width for row, width in zip(classes, widths)}
    axes.set(xlabel="% of the answers", xlim=(0, 100))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend(ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=8)
    return axes


def rules_scatter(table, projections=("q", "k", "v", "up")):
    """Each rule against brute force, one row of panels per rule, one column per projection, on logarithmic axes."""
    rules = [c for c in table.columns if c not in ("projection", "brute force")]
    figure, panels = plt.subplots(len(rules), len(projections), figsize=(8, 1.9 * len(rules)), sharex="col")
    for row, rule in zip(panels, rules):
        for axes, projection in zip(row, projections):
            points = table[table["projection"] == projection].iloc[::7]
            axes.scatter(points["brute force"], points[rule], s=2, alpha=0.4, rasterized=True)
            axes.set(xscale="log", yscale="log", title=f"{projection}: {rule}")
            axes.title.set_fontsize(9)
    figure.supxlabel("brute force")
    figure.supylabel("rule")
    figure.tight_layout()
    return panels[0, 0]


def corpus_curve(counts, reported):
    """Number of safety neurons relative to that at the paper's 200 documents, against corpus size, log-log.

    counts: data frame as from `appendix.corpus_counts`; reported: the paper's counts, size to number.
    """
    _, axes = plt.subplots()
    for name, row in counts.iterrows():
        axes.plot(row.index, row / row[200], marker="o", markersize=3, label=f"here, {name}")
    axes.plot(list(reported), [n / reported[200] for n in reported.values()], "k--", marker="s", markersize=3, label="paper")
    axes.set(xscale="log", yscale="log", xlabel="harmful prompts", ylabel="neurons, relative to 200 prompts")
    axes.legend(fontsize=8)
    return axes


def sweep_curves(tables, measures):
    """Rates with their 95 % bands against the share deactivated: one row of panels per model, one column per measure.

    tables: model name to the result of `mechanism.sweep`; measures: (measure, set) to panel title.
    """

    def draw(axes, chosen):
        """One panel: the conditions, the whole model as a dotted line, shares on a logarithmic axis."""
        _bands(axes, chosen[chosen["condition"] != "whole"], "condition", "fraction", 100)
        axes.axhline(100 * chosen[chosen["condition"] == "whole"]["rate"].iloc[0].value, color="grey", linestyle=":", label="whole model")
        axes.set(xscale="log")
        axes.xaxis.set_major_formatter("{x:g}")

    return _rate_panels(tables, measures, draw, "neurons deactivated (%)")


def _rate_panels(tables, measures, draw, xlabel):
    """A grid of panels in percent that `draw(axes, rows)` fills, with one legend below."""
    figure, panels = plt.subplots(len(tables), len(measures), figsize=(9, 2.8 * len(tables)), sharex=True, sharey=True, squeeze=False)
    for row, (model, table) in zip(panels, tables.items()):
        for axes, ((measure, name), title) in zip(row, measures.items()):
            draw(axes, table[(table["measure"] == measure) & (table["set"] == name)])
            axes.set(ylim=(-4, 104), title=f"{model.removeprefix('organism/')}: {title}", ylabel="%" if axes is row[0] else "")
            axes.title.set_fontsize(9)
    for axes in panels[-1]:
        axes.set(xlabel=xlabel)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, frameon=False)
    figure.tight_layout()
    return panels[0, 0]


def _bands(axes, table, hue, x, scale=1):
    """One line with a 95 % band per value of `hue`; marks repeat what colour says."""
    marks = ("o", "s", "^", "D")
    for i, (name, rows) in enumerate(table.groupby(hue, sort=False)):
        places, color = rows[x] * scale, sns.color_palette(PALETTE)[i]
        axes.plot(places, [100 * r.value for r in rows["rate"]], marker=marks[i], markersize=3.5, color=color, label=name)
        low, high = zip(*(r.interval for r in rows["rate"]))
        axes.fill_between(places, [100 * v for v in low], [100 * v for v in high], color=color, alpha=0.15, linewidth=0)


def depth_curves(tables, name):
    """Attack success against layer L for both directions, one panel per model. tables: model to `mechanism.depth_sweep`."""
    figure, panels = plt.subplots(1, len(tables), figsize=(max(6, 4 * len(tables)), 3), sharey=True, squeeze=False)
    for axes, (model, table) in zip(panels[0], tables.items()):
        chosen = table[(table["measure"] == "asr") & (table["set"] == name)]
        _bands(axes, chosen[chosen["direction"] != "whole"], "direction", "layer")
        axes.axhline(100 * chosen[chosen["direction"] == "whole"]["rate"].iloc[0].value, color="grey", linestyle=":", label="whole model")
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
            table["enrichment"].xs(model).unstack("condition", sort=False).plot.bar(ax=axes, color=sns.color_palette(PALETTE), legend=False, width=0.75)
            axes.axhline(1, color="grey", linestyle=":")
            axes.tick_params(axis="x", labelrotation=45 if axes is row[0] else 0)
            axes.grid(axis="x", visible=False)
            axes.set_title(model.removeprefix("organism/"), fontsize=9)
        row[0].set(ylabel="enrichment over chance", xlabel="")
        row[1].set(xlabel="layer")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=2, frameon=False)
    figure.tight_layout()
    return panels[0, 0]


def overlap_heatmaps(matrices):
    """Overlap |N_x ∩ N_y| / |N_y| in percent, one panel per way of choosing sets, on one scale. matrices: title to data frame."""
    figure, panels = plt.subplots(1, len(matrices), figsize=(3.4 * len(matrices), 3.2), sharey=True, squeeze=False)
    for axes, (title, matrix) in zip(panels[0], matrices.items()):
        sns.heatmap(100 * matrix, annot=True, fmt=".0f", vmin=0, vmax=100, cmap="viridis", square=True, cbar=False, ax=axes)
        axes.set(title=title, xlabel="y", ylabel="x")
        axes.title.set_fontsize(10)
    figure.tight_layout()
    return panels[0, 0]


def rates_heatmap(table, xlabel, ylabel):
    """A data frame of `Rate` cells as a heat map in percent."""
    _, axes = plt.subplots(figsize=(5.5, 3.6))
    sns.heatmap(100 * table.map(lambda r: r.value), annot=True, fmt=".0f", vmin=0, vmax=100, cmap="viridis", ax=axes, cbar_kws={"label": "%"})
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_yticklabels(axes.get_yticklabels(), rotation=0)
    return axes


def documents_curves(tables, measures):
    """Rates with their 95 % bands against the number of documents: one row of panels per model, one column per measure (Figure 6).

    tables: model name to the result of `defences.by_documents`; measures: (measure, set) to panel title.
    """
    return _rate_panels(tables, measures, lambda axes, rows: _bands(axes, rows, "condition", "documents"), "documents")


def tuning_grids(tables, measures):
    """Heat maps in percent over epochs and learning rates: one row per model, one column per measure (Figure 7).

    tables: model name to the result of `defences.grid`; measures: (measure, set) to panel title.
    """
    figure, panels = plt.subplots(len(tables), len(measures), figsize=(3.2 * len(measures), 2.9 * len(tables)), squeeze=False, sharey=True)
    for row, (model, table) in zip(panels, tables.items()):
        for axes, ((measure, name), title) in zip(row, measures.items()):
            chosen = table[(table["measure"] == measure) & (table["set"] == name)]
            values = chosen.assign(rate=[100 * rate.value for rate in chosen["rate"]]).pivot(index="epochs", columns="learning_rate", values="rate")
            values.columns = [f"{rate:g}" for rate in values.columns]
            sns.heatmap(values, annot=True, fmt=".0f", vmin=0, vmax=100, cmap="viridis", cbar=False, ax=axes)
            axes.set(xlabel="learning rate", ylabel="epochs" if axes is row[0] else "", title=f"{model.removeprefix('organism/')}: {title}")
            axes.title.set_fontsize(9)
    figure.tight_layout()
    return panels[0, 0]


def rerouting_curves(curve):
    """Both losses of a circuit breaker's training against the step, without their coefficients. curve: list of {step, rerouting, retain}."""
    figure, panels = plt.subplots(1, 2, figsize=(8, 2.6))
    titles = {"rerouting": "harmful: mean ReLU(cos)", "retain": "retained: mean distance"}
    for i, (axes, (name, title)) in enumerate(zip(panels, titles.items())):
        axes.plot([row["step"] for row in curve], [row[name] for row in curve], color=sns.color_palette(PALETTE)[i])
        axes.set(title=title, xlabel="training step", ylim=(0, None))
    figure.tight_layout()
    return panels[0]


def attack_heatmaps(results, attacks, language):
    """Success in percent of direct requests and attacks on every column: one row of panels per model, one panel per judge.

    results: model name to `defences.columns`; attacks: their names; language: that of the direct requests.
    """
    judges, asked = {"asr": "no refusal phrase", "coherent": "well-formed answer"}, {language: f"direct, {language}"} | {name: name for name in attacks}
    height = 0.5 + 0.38 * sum(len(columns) + 2 for columns in results.values())
    figure, panels = plt.subplots(len(results), 2, figsize=(9, height), squeeze=False, sharex=True, sharey="row")
    for row, (model, columns) in zip(panels, results.items()):
        for axes, (measure, title) in zip(row, judges.items()):
            mean = lambda draws, name: 100 * Rate.mean([draw.rates[measure, name] for draw in draws]).value
            values = pd.DataFrame({label: {column: mean(draws, name) for column, draws in columns.items()} for name, label in asked.items()})
            sns.heatmap(values, annot=True, fmt=".0f", vmin=0, vmax=100, cmap="viridis", cbar=False, ax=axes)
            axes.set_title(f"{model.removeprefix('organism/')}: {title}", fontsize=9)
    figure.tight_layout()
    return panels[0, 0]


def search_curves(results, attack):
    """Mean loss of an attack's best prompt against its step, one line per column, with 95 % bootstrap bands over requests.

    results: name to draws of `Column`. A search that has ended keeps its last loss.
    """
    curves = [(column, i, curve) for column, draws in results.items() for draw in draws for i, curve in enumerate(draw.attacks[attack].curves)]
    last = max(len(curve) for _, _, curve in curves)
    rows = [(column, i, step, curve[min(step, len(curve) - 1)]) for column, i, curve in curves for step in range(last)]
    table = pd.DataFrame(rows, columns=["column", "request", "step", "loss"])
    table = table.groupby(["column", "request", "step"], sort=False, as_index=False).mean()  # seeds add no requests
    _, axes = plt.subplots()
    sns.lineplot(table, x="step", y="loss", hue="column", style="column", errorbar=("ci", 95), seed=0, ax=axes)
    axes.set(xlabel=f"step of {attack}", ylabel="loss of the target (nats per token)", yscale="log")
    axes.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    return axes


def change_scores_panels(scores, chosen):
    """Change scores in descending order, and where the chosen neurons lie. scores: `ChangeScores`; chosen: their selection."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.9))
    values = scores.values.flatten().sort(descending=True).values
    left.plot([100 * (i + 1) / len(values) for i in range(len(values))], values, color=sns.color_palette(PALETTE)[0])
    left.axvline(100 * len(chosen) / len(values), color="grey", linestyle=":", label="patched below")
    left.set(xscale="log", xlabel="feed-forward neurons (%)", ylabel="change score (RMS)")
    left.xaxis.set_major_formatter("{x:g}")
    left.legend(frameon=False)
    counts = chosen.masks["down"].sum(1).tolist()
    right.bar(range(1, len(counts) + 1), counts, color=sns.color_palette(PALETTE)[0])
    right.set(xlabel="layer", ylabel="chosen neurons")
    right.grid(axis="x", visible=False)
    figure.tight_layout()
    return left


def restoration_curves(tables, measures):
    """Rates with their 95 % bands against the share of neurons patched: one row of panels per pair, one column per measure.

    tables: name to the result of `patching.restoration`; measures: (measure, set) to panel title.
    """

    def draw(axes, chosen):
        """One panel: the conditions as lines, recipient and donor as horizontal lines."""
        ends = chosen[chosen["fraction"] == 0].set_index("condition")["rate"]
        _bands(axes, chosen[chosen["fraction"] > 0], "condition", "fraction", 100)
        for name, style in (("recipient", ":"), ("donor", "--")):
            axes.axhline(100 * ends[name].value, color="grey", linestyle=style, label=name)
        axes.set(xscale="log")
        axes.xaxis.set_major_formatter("{x:g}")

    means = {name: patching.over_draws(table) for name, table in tables.items()}
    return _rate_panels(means, measures, draw, "neurons patched (%)")


def detector_matrix(table, titles):
    """Rates in percent (perplexity as a number) by detector and budget, one panel per measure.

    table: `comparison.long_table`; titles: measure to title.
    """
    count = table["detector"].nunique()
    figure, panels = plt.subplots(1, len(titles), figsize=(2.6 * len(titles) + 1.5, 0.32 * count + 1.2), sharey=True, squeeze=False)
    for axes, (measure, title) in zip(panels[0], titles.items()):
        rows = table[table["measure"] == measure]
        values = rows.assign(value=[rate if measure == "perplexity" else 100 * rate.value for rate in rows["rate"]])
        wide = values.pivot(index="detector", columns="budget", values="value").reindex(table["detector"].unique())
        form, limits = (".2f", {}) if measure == "perplexity" else (".0f", {"vmin": 0, "vmax": 100})
        sns.heatmap(wide.rename(columns=lambda share: f"{100 * share:g}"), annot=True, fmt=form, cmap="viridis", cbar=False, annot_kws={"size": 7}, ax=axes, **limits)
        axes.set(title=title, xlabel="% of the neurons", ylabel="")
        axes.grid(False)  # it would show where a cell is empty
        axes.title.set_fontsize(10)
        axes.tick_params(labelsize=8)
    figure.tight_layout()
    return panels[0, 0]


def agreement_heatmaps(overlap, correlation):
    """Overlap of the sets (percent) and rank correlation of the scores, detectors against detectors."""
    size = 0.42 * len(overlap) + 2.5
    figure, panels = plt.subplots(1, 2, figsize=(1.75 * size, size), sharey=True)
    for axes, values, form, title, limits in ((panels[0], 100 * overlap, ".0f", "shared neurons (%)", (0, 100)), (panels[1], correlation.round(1) + 0.0, ".1f", "rank correlation", (-1, 1))):
        sns.heatmap(values, annot=True, fmt=form, cmap="viridis", cbar=False, square=True, vmin=limits[0], vmax=limits[1], annot_kws={"size": 7}, ax=axes)
        axes.set_title(title, fontsize=10)
        axes.tick_params(labelsize=8)
    figure.tight_layout()
    return panels[0]
