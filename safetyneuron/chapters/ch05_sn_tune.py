"""Chapter 05, Table 2: figures and costs of its trainings and attacks."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from safetyneuron.book.plots import PALETTE
from safetyneuron.book.tables import two_line_heading


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


def search_curves(results, attack):
    """Mean loss of an attack's best prompt against its step, one line per column, with 95 % bootstrap bands over requests.

    results: name to draws of `Column`. A search that has ended keeps its last loss.
    """
    curves = [
        (column, i, curve)
        for column, draws in results.items()
        for draw in draws
        for i, curve in enumerate(draw.attacks[attack].curves)
    ]
    last = max(len(curve) for _, _, curve in curves)
    rows = [
        (column, i, step, curve[min(step, len(curve) - 1)])
        for column, i, curve in curves
        for step in range(last)
    ]
    table = pd.DataFrame(rows, columns=["column", "request", "step", "loss"])
    table = table.groupby(
        ["column", "request", "step"], sort=False, as_index=False
    ).mean()  # seeds add no requests
    _, axes = plt.subplots()
    sns.lineplot(
        table,
        x="step",
        y="loss",
        hue="column",
        style="column",
        errorbar=("ci", 95),
        seed=0,
        ax=axes,
    )
    axes.set(xlabel=f"step of {attack}", ylabel="loss of the target (nats per token)", yscale="log")
    axes.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    return axes


def costs_of_attacks(results, attacks):
    """What the attacks spent on each column: queries and tokens per request. results: column name to draws of `Column`."""

    def spent(draws, name, part):
        return sum(
            sum(getattr(draw.attacks[name], part)) / len(draw.attacks[name].queries)
            for draw in draws
        ) / len(draws)

    def text(draws, name):
        return f"{spent(draws, name, 'queries'):,.0f}\n{spent(draws, name, 'tokens'):,.0f} tokens"

    cells = {
        two_line_heading(column): [text(draws, name) for name in attacks]
        for column, draws in results.items()
    }
    return pd.DataFrame(cells, index=pd.Index(attacks, name="queries per request"))
