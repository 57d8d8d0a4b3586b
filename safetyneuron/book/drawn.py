"""What a drawing holds: its numbers for readers who don't see it, and its panels below each other for narrow screens."""

import re
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.category import StrCategoryLocator
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.container import BarContainer
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, LogFormatter

NARROW = 4.4  # inches, which a phone of 390 px shows in about 350
LONGEST = 18  # letters of a line beside an axis
BELOW = 36  # letters of a line below one
WIDEST = 5.5  # inches that can still be read there
MOST_COLUMNS = 12  # of a heat map whose cells can still hold a number there
MOST_POINTS = 100  # of one curve or cloud that are told
SMALLEST = 9.5  # points
LINE = 0.26  # inches of a line of that size, with the space around it
AUTOMATIC = re.compile(r"_child\d+|_nolegend_|_container\d+")


def read_drawing(figure) -> pd.DataFrame:
    """The numbers that a figure shows; panels of one title are told apart by what stands beside them.

    Returns
    -------
    pandas.DataFrame
        Columns panel, series, x, y and, of heat maps, value; those that say nothing are left out. What
        stands on an axis as text is text here. An artist's label names its series; one that begins with
        an underscore is in no legend. Of more than 100 points some are told, evenly spaced, and the series says so.
    """
    panels = _panels(figure)
    titles = [axes.get_title() for axes in panels]
    if len(set(titles)) < len(titles):
        _name_panels([axes for axes in panels if axes.get_subplotspec()])
        titles = [f"{axes.get_title()}, {axes.get_ylabel()}" for axes in panels]
    rows = [
        {"panel": _plain(title), **row}
        for title, axes in zip(titles, panels)
        for row in _read_panel(axes)
    ]
    table = pd.DataFrame(rows, columns=["panel", "series", "x", "y", "value"])
    return table[[c for c in table if c in "xy" or (table[c].notna() & (table[c] != "")).any()]]


def _panels(figure):
    """Axes that show something; a colour bar is none."""
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def _plain(text):
    return " ".join(text.split())


def _read_panel(axes):
    for artist in (*axes.containers, *axes.lines, *axes.collections):
        label = str(artist.get_label())
        series = "" if AUTOMATIC.fullmatch(label) else _plain(label.removeprefix("_"))
        points = _points_of(artist, axes)
        if len(points) > MOST_POINTS and not isinstance(artist, QuadMesh):
            series = f"{series} ({MOST_POINTS} of {len(points)} points)".strip()
            points = [points[i] for i in np.linspace(0, len(points) - 1, MOST_POINTS).astype(int)]
        for x, y, *value in points:
            place = {"x": _name(axes.xaxis, x), "y": _name(axes.yaxis, y)}
            yield {"series": series, **place, "value": value[0] if value else np.nan}


def _points_of(artist, axes):
    """(x, y) of points, corners and ends of bars; (x, y, value) of the cells of a heat map; none of what is not in the units of the axes."""
    if isinstance(artist, BarContainer):
        lying = artist.orientation == "horizontal"
        middles = [
            (b.get_width(), b.get_y() + b.get_height() / 2)
            if lying
            else (b.get_x() + b.get_width() / 2, b.get_height())
            for b in artist
        ]
        return middles
    if isinstance(artist, QuadMesh):
        values = np.ma.filled(artist.get_array().reshape(artist.get_coordinates().shape[0] - 1, -1), np.nan)  # fmt: skip
        return [(j + 0.5, i + 0.5, value) for (i, j), value in np.ndenumerate(values)]
    if isinstance(artist, PathCollection):
        return artist.get_offsets().tolist()
    if hasattr(artist, "get_xydata") and artist.get_transform() == axes.transData:
        return artist.get_xydata().tolist()
    return []


def _name(axis, place):
    """A place on an axis: the text that stands there, or else the number."""
    for known, text in _names(axis):
        if abs(known - place) <= 0.5:
            return _plain(text)
    return float(f"{place:.6g}")


def _names(axis):
    """(place, text) of an axis that names its places; nothing of one with a scale."""
    locator = axis.get_major_locator()
    if axis.get_scale() != "linear" or not isinstance(locator, FixedLocator | StrCategoryLocator):
        return []
    places = list(locator())
    return list(zip(places, map(str, axis.get_major_formatter().format_ticks(places))))


def needs_narrow(figure) -> bool:
    """Whether a figure is too wide for a phone and can be narrower; a heat map of many columns can't."""
    grids = [mesh for axes in _panels(figure) for mesh in axes.findobj(QuadMesh)]
    dense = any(mesh.get_coordinates().shape[1] > MOST_COLUMNS for mesh in grids)
    return figure.get_figwidth() > WIDEST and not dense


def narrow(figure):
    """Lay a figure out again for a narrow screen: panels below each other, text of readable size. It can't be undone."""
    panels = [axes for axes in _panels(figure) if axes.get_subplotspec()]
    grid = panels[0].get_subplotspec().get_gridspec()
    height = figure.get_figheight() / grid.nrows
    if len(panels) == len(figure.axes) > grid.nrows:
        _name_panels(panels)
        for place, axes in zip(figure.add_gridspec(len(panels), 1), panels):
            axes.set_subplotspec(place)
            axes.tick_params(labelleft=True, labelbottom=True)
    lines = [_wrap_names(axes) + _wrap_legend(axes) for axes in panels]
    rows = len({axes.get_subplotspec().rowspan.start for axes in panels})
    figure.set_size_inches(NARROW, rows * max(height, LINE * (max(lines) + 4)))
    for legend in list(figure.legends):
        texts = [text.get_text() for text in legend.get_texts()]
        legend.remove()
        below = dict(loc="upper center", bbox_to_anchor=(0.5, 0), frameon=False)
        figure.legend(legend.legend_handles, texts, **below)
    for axis in (axis for axes in panels for axis in (axes.xaxis, axes.yaxis)):
        _write_out(axis)
    for axes in panels:
        axes.set_xlabel(fill(_plain(axes.get_xlabel()), BELOW))
    for text in figure.findobj(Text):
        text.set_fontsize(max(SMALLEST, text.get_fontsize()))
    figure.tight_layout()
    for axes in panels:
        _drop_labels(axes)


def _wrap_names(axes):
    """Break the texts beside an axis into lines, and count these."""
    if not _names(axes.yaxis):
        return 0
    places, texts = zip(*_names(axes.yaxis))
    texts = [fill(text, LONGEST) for text in texts]
    axes.yaxis.set_ticks(places, texts, rotation=0)
    return sum(text.count("\n") + 1 for text in texts)


def _write_out(axis):
    """Write powers of ten as numbers: exponents are small print."""
    if isinstance(axis.get_major_formatter(), LogFormatter):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")


def _wrap_legend(axes):
    """Give a legend of many columns two, and count its lines."""
    legend = axes.get_legend()
    if legend is None or legend._ncols <= 2:
        return 0
    axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    return (len(legend.get_texts()) + 1) // 2


def _drop_labels(axes):
    """Leave out the numbers that are wider than their bars."""
    bars = [bar for each in axes.containers if isinstance(each, BarContainer) for bar in each]
    for bar, label in zip(bars, axes.texts):
        if bar.get_window_extent().width < label.get_window_extent().width:
            label.set_text("")


def _name_panels(panels):
    """Give every panel the title of its column, and the names of its row's and its column's axes, where it has none."""
    at = {
        (s.rowspan.start, s.colspan.start): axes
        for axes in panels
        for s in [axes.get_subplotspec()]
    }
    last = max(row for row, _ in at)
    for (row, column), axes in at.items():
        top, left, foot = at.get((0, column)), at.get((row, 0)), at.get((last, column))
        axes.set_title(axes.get_title() or (top or axes).get_title(), fontsize=10)
        axes.set_ylabel(axes.get_ylabel() or (left or axes).get_ylabel())
        axes.set_xlabel(axes.get_xlabel() or (foot or axes).get_xlabel())
