"""The style of every figure, and the figures that several chapters draw."""

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns

from safetyneuron.metrics.outcomes import estimate_rate, rates_by_run

PALETTE = "colorblind"
CLASS_COLOURS = (
    "#56b4e9",
    "#f0e442",
    "#d55e00",
    "#cc79a7",
    "#bbbbbb",
)  # of refusal, verdict, correct and wrong help, other
CLASS_NAMES = {"correct": "correct help", "wrong": "wrong help"}


def set_style():
    """Seaborn's white grid and colour-blind palette, for every figure of the book."""
    sns.set_theme(
        style="whitegrid",
        palette=PALETTE,
        rc={"figure.figsize": (7, 3.2), "figure.dpi": 120, "savefig.bbox": "tight"},
    )


def class_bars(classes):
    """Shares of the classes of answers as stacked bars, one per row. classes: row to the result of `sort_answers`."""
    _, axes = plt.subplots(figsize=(8, 0.9 + 0.38 * len(classes)))
    names = list(dict.fromkeys(name for shares in classes.values() for name in shares))
    left = dict.fromkeys(classes, 0.0)
    for name, colour in zip(names, CLASS_COLOURS):
        widths = [100 * shares[name].value for shares in classes.values()]
        bars = axes.barh(
            list(classes),
            widths,
            left=list(left.values()),
            label=CLASS_NAMES.get(name, name),
            color=colour,
        )
        axes.bar_label(
            bars, [f"{w:.0f}" if w >= 4 else "" for w in widths], label_type="center", fontsize=8
        )
        left = {row: left[row] + width for row, width in zip(classes, widths)}
    axes.set(xlabel="% of the answers", xlim=(0, 100))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend(
        ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=8
    )
    return axes


def draw_dots(axes, conditions, measure, *names):
    """One row a condition: a large dot a training, small ones for its random sets, and a bar from end to end of the interval.

    conditions: label to `Runs`.
    """
    for row, (label, runs) in enumerate(conditions.items()):
        values, estimate = (
            100 * rates_by_run(runs, measure, *names),
            estimate_rate(runs, measure, *names),
        )
        colour, spread = sns.color_palette(PALETTE)[row % 8], np.linspace(-0.22, 0.22, values.size)
        many = values.shape[1] > 1
        axes.scatter(
            values.flatten(),
            row + spread,
            s=7 if many else 26,
            color=colour,
            alpha=0.45 if many else 0.8,
            linewidth=0,
            label="_each training" + (" and random set" if many else ""),
        )
        low, high = (100 * end for end in estimate.interval)
        axes.plot([low, high], [row, row], color="black", linewidth=1.2, label="_95 % interval")
        axes.plot([100 * estimate.value], [row], "|", color="black", markersize=13, label="_mean")
    axes.set_yticks(range(len(conditions)), list(conditions), fontsize=8)
    axes.grid(axis="y", visible=False)


def rate_panels(tables, measures, draw, xlabel):
    """A grid of panels in percent that `draw(axes, rows)` fills, with one legend below."""
    figure, panels = plt.subplots(
        len(tables),
        len(measures),
        figsize=(9, 2.8 * len(tables)),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for row, (model, table) in zip(panels, tables.items()):
        for axes, ((measure, name), title) in zip(row, measures.items()):
            draw(axes, table[(table["measure"] == measure) & (table["set"] == name)])
            axes.set(
                ylim=(-4, 104),
                title=f"{model.removeprefix('organism/')}: {title}",
                ylabel="%" if axes is row[0] else "",
            )
            axes.title.set_fontsize(9)
    for axes in panels[-1]:
        axes.set(xlabel=xlabel)
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(),
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        ncols=2,
        frameon=False,
    )
    figure.tight_layout()
    return panels[0, 0]


def draw_bands(axes, table, hue, x, scale=1):
    """One line with a 95 % band per value of `hue`, and a dot a training where they are given; marks repeat what colour says."""
    marks = ("o", "s", "^", "D")
    for i, (name, rows) in enumerate(table.groupby(hue, sort=False)):
        places, color = rows[x] * scale, sns.color_palette(PALETTE)[i]
        axes.plot(
            places,
            [100 * r.value for r in rows["rate"]],
            marker=marks[i],
            markersize=3.5,
            color=color,
            label=name,
        )
        for place, trainings in zip(places, rows.get("by training", [])):
            axes.scatter([place] * len(trainings), [100 * v for v in trainings], s=6, color=color, alpha=0.4, linewidth=0)  # fmt: skip
        low, high = zip(*(r.interval for r in rows["rate"]))
        axes.fill_between(
            places,
            [100 * v for v in low],
            [100 * v for v in high],
            color=color,
            alpha=0.15,
            linewidth=0,
        )


def dot_shares(shares, bar, what):
    """A dot in percent for every training, and a dotted line at the bar of the claim. shares: name of a training to its share."""
    _, axes = plt.subplots(figsize=(7.5, 0.4 * len(shares) + 1.2))
    names = [name.removeprefix("organism/") for name in shares]
    axes.plot([100 * share for share in shares.values()], names, "o", markersize=9)
    axes.axvline(100 * bar, color="black", linestyle=":")
    axes.set(xlabel=f"{what}, % (dotted: {100 * bar:g} %)", xlim=(0, None))
    axes.invert_yaxis()
    return axes


def label_curves(axes, gap=0.07):
    """Write the label of every line beside its last point, at least `gap` of the panel's height apart; scales and limits must be set before."""
    within = axes.transScale + axes.transLimits
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    lines.sort(key=lambda line: line.get_ydata()[-1])
    right, places = zip(*(within.transform(line.get_xydata()[-1]) for line in lines))
    places = list(places)
    for i in range(1, len(lines)):
        places[i] = max(places[i], places[i - 1] + gap)
    highest = 1
    for i in reversed(range(len(lines))):
        places[i] = min(places[i], highest)
        highest = places[i] - gap
    beside = dict(xycoords="axes fraction", xytext=(6, 0), textcoords="offset points")
    for line, *place in zip(lines, right, places):
        options = dict(color=line.get_color(), va="center", fontsize=8)
        axes.annotate(line.get_label(), place, **beside, **options)
