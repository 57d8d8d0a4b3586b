"""What a drawing holds is what was drawn; for a phone it is laid out so that it can be read."""

import re

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import seaborn as sns

from safetyneuron.book import glue
from safetyneuron.book.drawn import narrow, needs_narrow, read_drawing
from safetyneuron.book.plots import class_bars, set_style
from safetyneuron.metrics.rates import Rate

PHONE = 350  # px that a figure has on a screen of 390


@pytest.fixture
def bars():
    set_style()
    shares = {"refusal": Rate(90, 100), "verdict": Rate(7, 100), "correct": Rate(3, 100)}
    yield class_bars({"as it is": shares, "with all neurons of Eq 3 switched off": shares}).figure
    plt.close("all")


@pytest.fixture
def heat():
    figure, panels = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
    values = pd.DataFrame([[1.0, 2.0, 3.0], [4.0, 5.0, float("nan")]], ["en", "zh"], list("abc"))
    for title, axes in zip(("help", "harm"), panels):
        sns.heatmap(values, ax=axes, annot=True, cbar=False)
        axes.set_title(title)
    yield figure, values
    plt.close("all")


def test_bars_are_told_by_the_names_of_their_rows(bars):
    table = read_drawing(bars)
    found = table.set_index(["series", "y"])["x"]
    assert len(table) == 6
    assert found["refusal", "as it is"] == 90
    assert found["correct help", "with all neurons of Eq 3 switched off"] == 3


def test_a_heat_map_gives_its_cells_back(heat):
    figure, values = heat
    table = read_drawing(figure)
    for _, cells in table.groupby("panel"):
        again = cells.pivot(index="y", columns="x", values="value").loc[
            values.index, values.columns
        ]
        pd.testing.assert_frame_equal(again, values, check_names=False)


def test_names_that_are_numbers_are_names_too():
    _, axes = plt.subplots(figsize=(9, 3))
    sns.heatmap(pd.DataFrame([[0.25, 0.5]], ["q"], [1, 2]), ax=axes)
    assert read_drawing(axes.figure).values.tolist() == [["1", "q", 0.25], ["2", "q", 0.5]]
    narrow(axes.figure)
    plt.close("all")


def test_curves_keep_their_points_and_names_and_lines_without_places_are_left_out():
    _, axes = plt.subplots()
    axes.plot([1, 10, 100], [0.5, 0.25, 0.125], label="a rule")
    axes.plot([3], [0.4], "o", label="_mean")
    axes.axhline(0.3)
    axes.set(xscale="log")
    table = read_drawing(axes.figure)
    assert table.values.tolist() == [
        ["a rule", 1, 0.5],
        ["a rule", 10, 0.25],
        ["a rule", 100, 0.125],
        ["mean", 3, 0.4],
    ]
    plt.close("all")


def test_of_many_points_some_are_told_with_both_ends():
    _, axes = plt.subplots()
    axes.plot(range(5000), range(5000), label="long")
    table = read_drawing(axes.figure)
    assert len(table) == 100 and table["series"].unique() == ["long (100 of 5000 points)"]
    assert table["x"].iloc[[0, -1]].tolist() == [0, 4999]
    plt.close("all")


def test_panels_of_one_title_are_told_apart():
    _, panels = plt.subplots(2, 1)
    for axes, model in zip(panels, ("llama", "mistral")):
        axes.plot([0], [1], label="a")
        axes.set(title="harm", ylabel=model)
    assert read_drawing(panels[0].figure)["panel"].nunique() == 2
    plt.close("all")


def smallest_text(figure):
    """Of a figure as a phone shows it, in px."""
    vector = glue.Drawn(figure).as_vector()
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', vector)[1])
    return (
        PHONE
        / width
        * min(map(float, re.findall(r"font(?:-size)?: *(?:[a-z0-9]+ )*?([\d.]+)px", vector)))
    )


def test_a_narrow_figure_can_be_read_on_a_phone(bars, heat):
    for figure in (bars, heat[0]):
        assert needs_narrow(figure) and smallest_text(figure) < 9
        narrow(figure)
        assert smallest_text(figure) >= 9


def test_no_exponent_is_small_print_on_a_phone():
    _, axes = plt.subplots(figsize=(7, 3))
    axes.plot([1e-5, 1, 1e4], [1, 10, 1000])
    axes.set(xscale="log", yscale="log")
    narrow(axes.figure)
    assert smallest_text(axes.figure) >= 9
    plt.close("all")


def test_a_legend_of_long_names_does_not_widen_a_narrow_figure():
    figure, panels = plt.subplots(1, 2, figsize=(9, 3))
    for i in range(4):
        panels[0].plot([i, 1], label=f"from layer L to the last one, condition {i}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="upper center", ncols=2)
    narrow(figure)
    assert smallest_text(figure) >= 9 and len(figure.legends[0].get_texts()) == 4
    plt.close("all")


def test_panels_of_a_narrow_figure_stand_below_each_other_with_their_names(heat):
    figure, _ = heat
    narrow(figure)
    first, second = (axes.get_position() for axes in figure.axes)
    assert first.y0 > second.y1 and first.x0 == pytest.approx(second.x0)
    assert all(
        [t.get_text() for t in axes.get_yticklabels()] == ["en", "zh"] for axes in figure.axes
    )


def test_a_dense_heat_map_stays_as_it_is():
    _, axes = plt.subplots(figsize=(9, 9))
    sns.heatmap(pd.DataFrame([[0.0] * 30] * 30), ax=axes)
    assert not needs_narrow(axes.figure)
    plt.close("all")


def test_what_stands_below_a_narrow_axis_is_no_wider_than_the_figure():
    figure, axes = plt.subplots(figsize=(8, 3))
    axes.set_xlabel("trade-off of harm and kept capability, with all that a reader must know " * 2)
    narrow(figure)
    figure.canvas.draw()
    assert axes.xaxis.label.get_window_extent().width <= figure.bbox.width
    plt.close(figure)
