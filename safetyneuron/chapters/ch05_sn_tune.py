"""Chapter 05, Table 2: figures and costs of its trainings and attacks."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from safetyneuron.book.defences import LABELS
from safetyneuron.book.glue import glue_figure, glue_table, glue_text
from safetyneuron.book.plots import PALETTE


def rerouting_curves(curve):
    """Both losses of a circuit breaker's training against the step, without their coefficients. curve: list of {step, rerouting, retain}."""
    figure, panels = plt.subplots(1, 2, figsize=(8, 2.6))
    titles = {"rerouting": "harmful: mean ReLU(cos)", "retain": "retained: mean distance"}
    for i, (axes, (name, title)) in enumerate(zip(panels, titles.items())):
        axes.plot(
            [row["step"] for row in curve],
            [row[name] for row in curve],
            color=sns.color_palette(PALETTE)[i],
        )
        axes.set(title=title, xlabel="training step", ylim=(0, None))
    figure.tight_layout()
    return panels[0]


def glue_rerouting(curve):
    """Glue where the likeness of harmful states begins, the most that retained ones are away, and both over the last ten steps. curve: as for `rerouting_curves`."""
    likeness, distance = ([row[name] for row in curve] for name in ("rerouting", "retain"))
    found = {"likeness_first": likeness[0], "likeness_last": np.mean(likeness[-10:])}
    found |= {"distance_most": max(distance), "distance_last": np.mean(distance[-10:])}
    glue_text(**{name: f"{value:.2g}" for name, value in found.items()})


def search_curves(columns, attack):
    """Mean loss of an attack's best prompt against its step, one line per condition, with 95 % bootstrap bands over requests.

    columns: condition to trainings to draws of `Column`. A search that has ended keeps its last loss.
    """
    curves = [
        (_label(condition), i, curve)
        for condition, trainings in columns.items()
        for draws in trainings
        if attack in draws[0].attacks
        for i, curve in enumerate(draws[0].attacks[attack].curves)
    ]
    last = max(len(curve) for _, _, curve in curves)
    rows = [
        (label, i, step, curve[min(step, len(curve) - 1)])
        for label, i, curve in curves
        for step in range(last)
    ]
    table = pd.DataFrame(rows, columns=["model", "request", "step", "loss"])
    table = table.groupby(
        ["model", "request", "step"], sort=False, as_index=False
    ).mean()  # trainings add no requests
    _, axes = plt.subplots()
    options = dict(x="step", y="loss", hue="model", style="model", errorbar=("ci", 95), seed=0)
    sns.lineplot(table, ax=axes, **options)
    axes.set(xlabel=f"step of {attack}", ylabel="loss of the target (nats per token)", yscale="log")
    axes.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    return axes


def costs_of_attacks(columns, attacks):
    """What the attacks spent on each model: queries and tokens per request. columns: condition to trainings to draws of `Column`."""

    def spent(trainings, name, part):
        means = [np.mean(getattr(draws[0].attacks[name], part)) for draws in trainings]
        return np.mean(means)

    rows = {
        _label(condition): {
            name: f"{spent(trainings, name, 'queries'):,.0f}\n{spent(trainings, name, 'tokens'):,.0f} tokens"
            for name in attacks
        }
        for condition, trainings in columns.items()
        if trainings[0][0].attacks
    }
    return pd.DataFrame(rows).T.rename_axis("queries per request")


def glue_searches(columns, attacks):
    """Glue what the attacks spent and how GCG's loss fell; in an edition without attacks, that there are none."""
    if attacks:
        glue_table("spent", costs_of_attacks(columns, attacks))
        glue_figure("gcg", search_curves(columns, "GCG"))
    else:
        glue_text(**dict.fromkeys(("spent", "gcg"), "Nothing is attacked in this edition."))


def _label(condition):
    return LABELS[condition].replace("\n", " ")
