"""Every notebook in the smoke edition, built into the book; and the rules that keep notebooks readable."""

import importlib
import json
import re
import statistics

import nbformat
import pytest
import yaml
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.book
def test_every_chapter_is_in_the_site_with_its_outputs(site):
    for source in NOTEBOOKS:
        page = (site / "html" / "notebooks" / f"{source.stem}.html").read_text(encoding="utf-8")
        assert "<table" in page or "_images/" in page
        assert "{glue" not in page and "glue:text" not in page
        assert "Traceback" not in page


@pytest.mark.book
def test_executed_notebooks_lie_at_the_path_of_their_source(site):
    for source in NOTEBOOKS:
        executed = nbformat.read(site / "stage" / "smoke" / "notebooks" / source.name, 4)
        assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")


@pytest.mark.book
def test_table_1_shows_paper_and_measurement_with_intervals(site):
    page = (site / "html" / "notebooks" / "02_verification.html").read_text(encoding="utf-8")
    table = next(t for t in re.findall(r"<table.*?</table>", page, re.S) if "MultiJail-En" in t)
    assert all(
        number in table for number in ("97.0", "83.0", "81.6", "47.8")
    )  # the paper's Deact-SN column
    assert len(re.findall(r"\d+\.\d\s+\[\d+\.\d, \d+\.\d\]", table)) >= 40


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_arguments_not_programs(path):
    book = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert book["metadata"]["kernelspec"]["name"] == "python3"
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    parameters = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    assert len(parameters) == 1
    assert all(re.match(r"\w+ = .+  # .+", line) for line in parameters[0]["source"])
    lengths = [
        len([line for line in cell["source"] if line.strip()])
        for cell in code
        if cell not in parameters
    ]
    assert statistics.median(lengths) <= 5 and max(lengths) <= 15
    assert (
        max(len(line.rstrip()) for cell in code for line in cell["source"]) <= 90
    )  # the width of a page


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_figure_has_alt_text(path):
    book = nbformat.read(path, 4)
    text = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    figures = re.findall(r'glue_figure\("([\w-]+)"', "\n".join(cell.source for cell in book.cells))
    for name in figures:
        block = re.search(rf"```{{glue:figure}} {name}\n(.*?)```", text, re.S)
        assert block and ":alt:" in block[1], name


def test_editions_name_only_notebooks_and_parameters_that_exist():
    for path in (ROOT / "workflow" / "editions").glob("*.yaml"):
        edition = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert edition["edition"] == path.stem
        assert set(edition["notebooks"]) == {n.stem for n in NOTEBOOKS}
        for name, given in edition["notebooks"].items():
            source = "".join(
                line
                for c in nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells
                if "parameters" in c.metadata.get("tags", [])
                for line in c.source
            )
            assert all(re.search(rf"^{parameter} = ", source, re.M) for parameter in given)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_exercise_has_a_solution_that_runs_and_a_value_to_check(path):
    cells = nbformat.read(path, 4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    labels = re.findall(r"```{exercise}.*?\n:label: (\S+)\n(.*?)```", text, re.S)
    assert len(labels) >= 3 and text.count("{solution-end}") == len(labels)
    for label, question in labels:
        start = next(
            i for i, cell in enumerate(cells) if f"{{solution-start}} {label}\n" in cell.source
        )
        (check,) = re.findall(r"{glue:text}`(\w+)`", question)
        assert (
            cells[start + 1].cell_type == "code" and f"{check}=" in cells[start + 1].source
        )  # so every build runs it
        assert "{solution-end}" in cells[start + 2].source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_chapter_has_the_same_skeleton(path):
    text = "\n\n".join(
        cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"
    )
    steps = [
        r"\*\*The (paper's )?(claims?|question)\.\*\*",
        r"\*\*In short\.\*\*",
        r"\*Prerequisites: .*Runs? in|\*Prerequisites: .* runs in",
    ]
    steps += [
        r"^## Paper and here$",
        r"^## What this does not show$",
        r"^## Exercises$",
        r"\*\*What's next\.\*\*",
    ]
    places = [re.search(step, text, re.M) for step in steps]
    assert all(places), [step for step, place in zip(steps, places) if not place]
    assert [place.start() for place in places] == sorted(place.start() for place in places)
    table = text.partition("## Paper and here\n\n")[2].partition("\n\n")[0]
    assert table.count("\n") >= 2 and "{glue:text}" in table and "{numref}" in table
    assert "```{admonition} Definition" in text
    assert path.stem == "00_organism" or "{term}" in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_code_that_a_chapter_folds_under_a_call_exists(path):
    for name in re.findall(r"\{source\} ([\w.]+)", path.read_text(encoding="utf-8")):
        module, _, what = name.rpartition(".")
        assert hasattr(importlib.import_module(module), what), name


def test_no_two_chapters_give_a_figure_the_same_name():
    names = [
        name
        for path in NOTEBOOKS
        for name in re.findall(r":name: ([\w-]+)", path.read_text(encoding="utf-8"))
    ]
    assert sorted(names) == sorted(set(names))
