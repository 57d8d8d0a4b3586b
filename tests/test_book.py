"""Every notebook in the smoke edition, built into the book; and the rules that keep notebooks readable."""

import importlib
import json
import re
import shutil
import statistics
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "workflow"))
from assemble import drop_solutions

from safetyneuron.run.editions import read_edition
from safetyneuron.run.execute import check_parameters

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
def test_nothing_of_a_notebook_is_glued_twice(path):
    text = "".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])
    for kinds in ("figure|table", "table|data"):  # a table and data are both kept as CSV
        names = re.findall(rf'glue_(?:{kinds})\(\s*"([^"]+)"', text)
        assert len(names) == len(set(names)), names


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
        edition = read_edition(path)
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
            check_parameters(ROOT / "notebooks" / f"{name}.ipynb", given)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_exercise_asks_for_a_guess_and_has_a_hint_and_a_solution_that_runs(path):
    cells = nbformat.read(path, 4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    labels = re.findall(r"````{exercise}.*?\n:label: (\S+)\n(.*?)\n````", text, re.S)
    assert len(labels) >= 3 and text.count("{solution-end}") == len(labels)
    for label, question in labels:
        assert "```{admonition} Hint" in question
        assert re.search(r"^\*(Easy|Medium|Hard), \d+ minutes\.\*$", question, re.M)
        (check,) = re.findall(r"{check}`(\w+)`", question)
        i = next(i for i, cell in enumerate(cells) if f":label: {label}\n" in cell.source)
        stub, start, solution, end = cells[i + 1 : i + 5]
        assert f'predict("{check}", None)' in stub.source  # nothing is guessed in a build
        assert f"{{solution-start}} {label}\n" in start.source
        assert (
            solution.cell_type == "code" and f"{check}=" in solution.source
        )  # so every build runs it
        assert "{solution-end}" in end.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_book_without_solutions_asks_every_exercise_and_answers_none(path):
    cells = nbformat.read(path, 4).cells
    text = "\n".join(cell.source for cell in drop_solutions(cells))
    assert "{solution" not in text and "reveal(" not in text
    assert text.count("{check}`") == text.count("predict(") == 3
    assert "**What's next.**" in text


@pytest.mark.book
def test_the_first_chapters_can_be_read_while_the_others_run(site, tmp_path):
    names = ("00_organism", "01_detection")
    notebooks = [site / "stage" / "smoke" / "notebooks" / f"{name}.ipynb" for name in names]
    pages = ["_config.yml", *[str(p.relative_to(ROOT)) for p in (ROOT / "book" / "_ext").glob("*.py")]]  # fmt: skip
    pages += [str(p.relative_to(ROOT)) for p in (ROOT / "book" / "_static").glob("*.*")]
    for page in pages:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    command = [sys.executable, ROOT / "workflow" / "assemble.py", "--first", "done", *notebooks]
    told = subprocess.run([*command, *pages], cwd=tmp_path, capture_output=True, text=True)
    assert "can be read in _build/first/notebooks/00_organism.html" in told.stderr
    for name in names:
        page = tmp_path / "_build" / "first" / "notebooks" / f"{name}.html"
        assert "_images/" in page.read_text(encoding="utf-8")


@pytest.mark.book
def test_a_site_with_an_address_lists_its_pages_and_has_cards(site):
    places = (site / "html" / "sitemap.xml").read_text(encoding="utf-8")
    page = (site / "html" / "book" / "index.html").read_text(encoding="utf-8")
    for source in NOTEBOOKS:
        assert f"<loc>https://book.example.org/notebooks/{source.stem}.html</loc>" in places
    assert 'property="og:image" content="https://book.example.org/_static/poster.png"' in page
    assert re.search(r'<meta name="description" content="\w+', page)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_chapter_has_an_open_question_and_a_wrong_read(path):
    text = "\n".join(cell.source for cell in nbformat.read(path, 4).cells)
    assert "{open}`" in text
    assert "Wrong read, better read" in text and "*Wrong:*" in text and "*Better:*" in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_chapter_has_the_same_skeleton(path):
    text = "\n\n".join(
        cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"
    )
    steps = [
        r"\*\*The (paper's )?(claims?|question)\.\*\*",
        r"\*\*In short\.\*\*",
        r"\*Prerequisites: .*\{ran\}`",
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
