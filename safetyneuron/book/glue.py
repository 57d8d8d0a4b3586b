"""What the notebooks hand to the pages: values, tables, figures and data, glued under a name."""

import base64
import io
import json

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.collections import PathCollection
from myst_nb import glue

from safetyneuron.book import paper as reported
from safetyneuron.book.drawn import narrow, needs_narrow, read_drawing
from safetyneuron.book.plots import CLASS_NAMES
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.metrics.answer_class import examples_of
from safetyneuron.metrics.estimates import Estimate
from safetyneuron.metrics.outcomes import estimate_rate, rates_by_run
from safetyneuron.metrics.rates import Rate

MANY_DOTS = 500  # more dots of one kind are drawn as pixels within the SVG

MEASURES = {
    "asr": "Attack success",
    "coherent": "Help with harm",
    "over_refusal": "Over-refusal",
    "helpful": "Helpful answers",
    "accuracy": "Accuracy",
}


def glue_text(**values):
    """Glue values for `{glue:text}` roles in the prose."""
    for name, value in values.items():
        glue(name, str(value), display=False)


def glue_rates(**rates):
    """Glue rates as percent with their interval."""
    glue_text(**{name: rate.percent for name, rate in rates.items()})


class Drawn:
    """A figure as SVG for the pages and as PNG for the slides; the same drawing gives the same bytes."""

    def __init__(self, figure):
        self.figure = figure

    def _repr_mimebundle_(self, include=None, exclude=None):
        pixels = base64.b64encode(self._save(format="png")).decode()
        return {"image/svg+xml": self.as_vector(), "image/png": pixels}

    def as_vector(self):
        """The figure as it is laid out now, as the text of an SVG."""
        for dots in self.figure.findobj(PathCollection):
            dots.set_rasterized(len(dots.get_offsets()) > MANY_DOTS)
        with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "safetyneuron"}):
            return self._save(format="svg", metadata={"Date": None}).decode()

    def _save(self, **options):
        file = io.BytesIO()
        self.figure.savefig(file, bbox_inches="tight", **options)
        return file.getvalue()


def glue_figure(name, axes):
    """Glue a figure under `name` and close it, so that it appears once, with its caption.

    With it go its numbers as CSV, as `drawn-{name}`, shown unless `glue_data` gives others, and, of a wide one, the same drawing for
    a narrow screen as `narrow-{name}`; the pages show both.
    """
    drawn = Drawn(axes.figure)
    glue(name, drawn)
    glue_text(**{f"drawn-{name}": read_drawing(axes.figure).to_csv(index=False)})
    if needs_narrow(axes.figure):
        narrow(axes.figure)
        glue_text(**{f"narrow-{name}": drawn.as_vector()})
    plt.close(axes.figure)


def glue_slide(name, axes):
    """Glue what a slide shows in place of the figure `name`, where that has more in it than can be read from afar."""
    glue(f"{name}-slide", Drawn(axes.figure), display=False)
    plt.close(axes.figure)


def glue_table(name, table):
    """Glue a data frame under `name`; cells may hold several lines. Cells that stand beside the paper's go along, for the page of all."""
    glue(name, table.style.set_uuid(name).set_table_attributes('class="dataframe"'))
    glue_text(**{f"csv-{name}": table.to_csv()})
    if "cells" in table.attrs:
        glue_text(**{f"cells-{name}": json.dumps(table.attrs["cells"])})


def glue_data(name, table):
    """Glue the numbers behind a figure as CSV, in place of those that are read from the drawing; rates become value, low, high and trials."""
    flat = table.reset_index(drop=isinstance(table.index, pd.RangeIndex))
    for column in [c for c in flat if isinstance(flat[c].iloc[0], (Rate, Estimate))]:
        rates = flat.pop(column)
        parts = {
            "": "value",
            " low": ("interval", 0),
            " high": ("interval", 1),
            " trials": "trials",
        }
        for suffix, part in parts.items():
            flat[f"{column}{suffix}"] = [
                getattr(r, part) if isinstance(part, str) else getattr(r, part[0])[part[1]]
                for r in rates
            ]
    glue_text(**{f"csv-{name}": flat.to_csv(index=False)})


def by_model(tables):
    """Tables of several models as one. tables: model to data frame."""
    return pd.concat(tables, names=["model", "row"]).droplevel("row")


def by_model_rows(tables):
    """Tables of several models below each other, the model in front; of one model as it is. Columns with nothing but dashes are left out."""
    cells = [cell for table in tables.values() for cell in table.attrs.get("cells", [])]
    joined = next(iter(tables.values())) if len(tables) == 1 else pd.concat(tables, names=["model"])
    joined = joined.loc[:, (joined != "–").any()]
    joined.attrs["cells"] = cells
    return joined


def beside_paper(number, results, paper_model, make):
    """A table of several models, each beside the paper's column of its own name. paper_model: whose cells stand beside an organism's; make: of a model, what was found of it, and the paper's name or None."""
    return by_model_rows(
        {
            model: make(model, found, reported.column_for(number, model, paper_model))
            for model, found in results.items()
        }
    )


def percent_table(table):
    """A data frame of `Rate` cells as text."""
    return table.map(lambda rate: rate.percent)


def glue_examples(name, model_name, prompts, texts):
    """Glue three answers of each class of an organism; what another model answers to harmful requests is not shown."""
    if not model_name.startswith("organism/"):
        return glue_text(**{name: "Answers of this model are scored and dropped."})
    rows = [
        (CLASS_NAMES.get(kind, kind), f"{prompt}\n→ {text}")  # one column, for narrow screens
        for kind, pairs in examples_of(prompts, texts).items()
        for prompt, text in pairs
    ]
    table = (
        pd.DataFrame(rows, columns=["class", "request → answer"])
        .style.hide(axis="index")
        .set_uuid(name)
    )
    glue(name, table.set_table_attributes('class="dataframe texts"'))


def lines(rate):
    """A rate as text, its interval on a line of its own."""
    return rate.percent.replace(" [", "\n[")


def run_cell(runs, measure, *names):
    """A table cell of `Runs`: percent, interval, and the range over trainings and draws where there are several."""
    text = lines(estimate_rate(runs, measure, *names))
    values = 100 * rates_by_run(runs, measure, *names)
    return text if values.size == 1 else f"{text}\n{values.min():.1f} to {values.max():.1f}"


def printed_cells(number, paper_model):
    """Cells of one model in a table of the paper, (row, column) to text; an asterisk where its own rows give another value; none of no model."""
    if paper_model is None:
        return {}
    cells = reported.table(number).query("model == @paper_model")
    if cells.empty:
        raise SafetyNeuronError(
            f"Table {number} has no model {paper_model!r}: use one of {', '.join(reported.table(number)['model'].unique())}"
        )
    slips = {
        (row, column): slip
        for (table, row, model, column), slip in reported.SLIPS.items()
        if (table, model) == (number, paper_model)
    }
    texts = {}
    for row, column, value in cells[["row", "column", "value"]].itertuples(index=False):
        slip = f"*\n(its rows: {slips[row, column]})" if (row, column) in slips else ""
        texts[row, column] = "–" if value != value else f"{value:.1f}{slip}"
    return texts


def glue_paper(number, model, paper_model, **cells):
    """Glue `paper_model`, whose cells of a table stand beside a model, and `paper_NAME`, some of them as text; dashes where the paper does not have it.

    model: that ran; paper_model: whose cells stand beside an organism's; cells: NAME to (row, column, …), what several columns have of one row.
    """
    name = reported.column_for(number, model, paper_model)
    printed = printed_cells(number, name)
    glue_text(paper_model=name or "not one of the paper's models")
    for part, (row, *columns) in cells.items():
        values = (printed.get((row, column), "–").replace("\n", " ") for column in columns)
        glue_text(**{f"paper_{part}": " → ".join(values)})


def with_cells(number, table, paper_rows):
    """The table, with its cells that stand beside the paper's in `attrs`: a list of {table, row, column, model, way, text}.

    paper_rows: the paper's row of every row, or None. Columns are (here or paper, way, the paper's column).
    """
    here = [
        (i, *column) for i, column in enumerate(table.columns) if column[0].startswith("Here: ")
    ]
    table.attrs["cells"] = [
        {"table": number, "row": row, "column": column, "model": model.removeprefix("Here: "), "way": way, "text": table.iloc[r, i]}
        for r, row in enumerate(paper_rows) if row for i, model, way, column in here
    ]  # fmt: skip
    return table
