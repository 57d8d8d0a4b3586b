import html
import json
import os
import re
import subprocess
import sys
import zipfile

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from conftest import ROOT

from safetyneuron.book import claims, glue
from safetyneuron.book import paper as reported
from safetyneuron.run import executed

sys.path.insert(0, str(ROOT / "workflow"))
import assemble
import pages


def notebook_with(cells, **metadata):
    """An executed notebook whose outputs hold cells of the paper's tables, as `glue_table` leaves them."""
    data = {"application/papermill.record/text/plain": repr(json.dumps(cells))}
    output = nbformat.v4.new_output(
        "display_data", data, metadata={"scrapbook": {"name": "cells-table-2"}}
    )
    parameters = nbformat.v4.new_code_cell(
        'models = ["a/b"]  # some\ndtype = "float32"  # wide', metadata={"tags": ["parameters"]}
    )
    return nbformat.v4.new_notebook(
        cells=[parameters, nbformat.v4.new_code_cell("", outputs=[output])], metadata=metadata
    )


CELL = {
    "table": 2,
    "row": "GCG",
    "column": "SN-Tune",
    "model": "organism/x",
    "way": "Eq 3",
    "text": "5.0\n[1.0, 20.0]\n4.0 to 6.0",
}


def test_every_cell_of_the_paper_has_a_row_with_ours_beside_it():
    text = pages.paper_and_here({"05": notebook_with([CELL])})
    assert text.count('<tr><th scope="row">') - len(reported.FACTS) == sum(
        len(reported.table(n).groupby(["row", "column"])) for n in range(1, 6)
    )
    assert "<td>Llama2-7B-Base: 6.8</td>" in text
    row = next(
        line
        for line in text.partition("<tbody>")[2].split("<tr>")
        if "GCG, SN-Tune <small>Table 2</small>" in line
    )
    assert (
        "Llama3-8B-Instruction: 4\n" in row
        and '<a href="../notebooks/05.html">organism/x, Eq 3</a>: 5.0 [1.0, 20.0]; single runs 4.0 to 6.0'
        in row
    )
    slips = text.partition("## Where the paper disagrees")[2].partition("\n## ")[0]
    assert slips.count("\n| ") == 2 + len(reported.DISAGREEMENTS)
    assert "68.4* (its rows: 70.6)" in text and text.count("not measured") > 90


def test_cells_of_a_table_go_along_with_it():
    columns = pd.MultiIndex.from_tuples(
        [("Paper", "m", "SN-Tune"), ("Here: organism/x", "Eq 3", "SN-Tune")]
    )
    table = glue.with_cells(
        2, pd.DataFrame([["4.0", "5.0"], ["–", "6.0"]], columns=columns), ["GCG", None]
    )
    assert table.attrs["cells"] == [
        {
            "table": 2,
            "row": "GCG",
            "column": "SN-Tune",
            "model": "organism/x",
            "way": "Eq 3",
            "text": "5.0",
        }
    ]


def test_a_run_writes_how_it_was_run(tmp_path):
    path = tmp_path / "a.ipynb"
    nbformat.write(notebook_with([CELL]), path)
    executed.record(path, 12.4)
    how = executed.how(nbformat.read(path, 4))
    assert how["seconds"] == 12 and how["device"] and how["versions"]["torch"]
    text = pages.status({"05_sn_tune_instruct": nbformat.read(path, 4)})
    assert (
        "`a/b`" in text
        and "float32" in text
        and "\n  - 12\n" in text
        and f"torch {how['versions']['torch']}" in text
    )
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    assert not head or head.startswith(how["commit"].rstrip("+"))


@pytest.mark.book
def test_a_rerun_shows_its_results_and_the_book_shows_them_once_where_they_are_told(site):
    for path in (site / "stage" / "smoke" / "notebooks").glob("*.ipynb"):
        shown = [
            (set(cell.metadata.get("tags", [])), kind)
            for cell in nbformat.read(path, 4).cells
            for output in cell.get("outputs", [])
            if "scrapbook" in output.get("metadata", {})  # what was printed has none
            for kind in output.data
            if not kind.startswith("application/")
        ]
        assert {"image/svg+xml", "text/html", "text/markdown"} <= {kind for _, kind in shown}
        assert all(tags & {"remove-output", "remove-cell"} for tags, _ in shown), path.stem


@pytest.mark.book
def test_the_site_holds_measurements_beside_every_table(site):
    page = (site / "html" / "book" / "paper_and_here.html").read_text(encoding="utf-8")
    for table in range(1, 6):
        rows = [row for row in page.split("<tr>") if f"<small>Table {table}</small>" in row]
        assert any("organism/" in row for row in rows), table
    status = (site / "html" / "book" / "status.html").read_text(encoding="utf-8")
    assert status.count("CPU") + status.count("NVIDIA") >= 12


@pytest.mark.book
def test_a_chapter_says_how_long_its_own_run_took(site):
    for path in (site / "stage" / "smoke" / "notebooks").glob("*.ipynb"):
        seconds = executed.how(nbformat.read(path, 4))["seconds"]
        said = f"{seconds} seconds" if seconds < 100 else f"{round(seconds / 60)} minutes"
        page = (site / "html" / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
        assert f"This page ran for {said} when" in page, path.stem


@pytest.mark.book
def test_terms_show_their_definition_on_hover(site):
    page = (site / "html" / "book" / "index.html").read_text(encoding="utf-8")
    assert 'title="What cannot be switched off in part' in page


@pytest.mark.book
def test_tables_are_numbered_as_tables(site):
    page = (site / "html" / "notebooks" / "02_verification.html").read_text(encoding="utf-8")
    source = (ROOT / "notebooks" / "02_verification.ipynb").read_text(encoding="utf-8")
    for kind, calls in (("Table", "table|examples"), ("Figure", "figure")):
        assert (
            page.count(f'caption-number">Our {kind} ')
            == len(re.findall(rf"glue_(?:{calls})\(", source))
            > 0
        )


@pytest.mark.book
def test_chapters_refer_to_tables_and_figures_of_others_by_number(site):
    page = (site / "html" / "notebooks" / "08_ablations.html").read_text(encoding="utf-8")
    for anchor in ("05_sn_tune_instruct.html#tab-2", "06_sn_tune_base.html#tab-3", "#fig-grid"):
        assert re.search(
            rf'href="[^"]*{anchor}"><span class="std std-numref">Our (Table|Figure) \d+<', page
        ), anchor


@pytest.mark.book
def test_texts_of_a_chapter_stand_on_other_pages(site):
    found = executed.texts(
        nbformat.read(site / "stage" / "smoke" / "notebooks" / "A1_parallel_detection.ipynb", 4)
    )
    page = html.unescape(
        (site / "html" / "book" / "released_code.html").read_text(encoding="utf-8")
    )
    assert found["effect_q_scale"] in page and found["effect_v_index"] in page


@pytest.mark.book
def test_slides_say_what_the_chapters_of_this_build_found(site):
    slides = (site / "html" / "_static" / "slides" / "index.html").read_text(encoding="utf-8")
    sections = re.findall(r"<section>.*?</section>", slides, re.S)[1:-1]
    stage = site / "stage" / "smoke" / "notebooks"
    judged = {p.stem: executed.judged(nbformat.read(p, 4)) for p in stage.glob("*.ipynb")}
    shown = [(chapter, *of) for chapter, *of in pages.SLIDES if of[1] in judged[chapter]]
    assert len(sections) == len(shown) > 0
    assert {chapter for chapter, *_ in pages.SLIDES} == set(judged)
    for section, (chapter, name, key) in zip(sections, shown):
        row = judged[chapter][key]
        said = claims.sentence_of(key, row["verdict"])
        head = html.unescape(re.search(r"<h2>(.*?)</h2>", section, re.S)[1])
        assert head == said and f">{row['verdict']}</span></small>" in section
        assert row["number"] in html.unescape(section).replace("\N{NO-BREAK SPACE}", " ")
        assert f"{chapter}-{name}.png" in section


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_every_chapter_has_notes_for_teachers_that_can_be_read_aloud(path):
    cells = nbformat.read(path, 4).cells
    text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    notes = pages.notes_for_teachers(text)
    assert re.fullmatch(r"Students may say: .+ Answer: .+ Ask: .+", notes)
    assert not re.search(r"[{}`*]|\]\(", notes)


@pytest.mark.book
def test_the_picture_of_the_readme_is_the_one_that_the_build_makes(site):
    name = "book/_static/poster.png"
    built, shipped = (plt.imread(path) for path in (site / "stage" / "smoke" / name, ROOT / name))
    assert built.shape == shipped.shape and abs(built - shipped).mean() < 0.01


@pytest.mark.book
def test_page_one_tells_findings_of_this_build(site):
    page = (site / "html" / "book" / "index.html").read_text(encoding="utf-8")
    source = (ROOT / "book" / "index.md").read_text(encoding="utf-8")
    keys = re.search(r"```{findings}\n(.*?)```", source, re.S)[1].split()
    box = html.unescape(re.search(r'class="findings.*?</div>', page, re.S)[0])
    for key in keys:
        chapter = claims.load_claims()[key]["chapter"]
        path = site / "stage" / "smoke" / "notebooks" / f"{chapter}.ipynb"
        row = executed.judged(nbformat.read(path, 4))[key]
        assert f">{row['verdict']}</span>" in box and row["number"] in box


@pytest.mark.book
def test_every_chapter_can_be_downloaded_with_its_data(site):
    for path in (site / "stage" / "smoke" / "notebooks").glob("*.ipynb"):
        page = (site / "html" / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
        assert (
            f"../_sources/notebooks/{path.name}" in page
            and f"../_static/data/{path.stem}.zip" in page
        )
        with zipfile.ZipFile(site / "html" / "_static" / "data" / f"{path.stem}.zip") as archive:
            tables = {
                name: pd.read_csv(archive.open(name))
                for name in archive.namelist()
                if name.endswith(".csv")
            }
            values, given = (
                json.loads(archive.read(name)) for name in ("values.json", "parameters.json")
            )
        assert given and all(len(table) for table in tables.values())
        assert set(re.findall(r"glue:text}`(\w+)`", path.read_text(encoding="utf-8"))) <= set(
            values
        ) | {n for n in executed.texts(nbformat.read(path, 4)) if n.startswith("check_")}
    assert tables  # the last one's


@pytest.mark.book
def test_launch_buttons_open_the_source_notebook_at_its_path(site):
    page = html.unescape(
        (site / "html" / "notebooks" / "02_verification.html").read_text(encoding="utf-8")
    )
    assert (
        "https://mybinder.org/v2/gh/example/book/main?urlpath=lab/tree/notebooks/02_verification.ipynb"
        in page
    )
    assert (
        "https://colab.research.google.com/github/example/book/blob/main/notebooks/02_verification.ipynb"
        in page
    )
    assert (
        "https://hub.example.org/hub/user-redirect/git-pull?repo=https%3A//github.com/example/book"
        in page
    )
    assert "notebooks/02_verification.ipynb" in page.partition("https://hub.example.org")[2][:300]


def test_without_a_repository_there_are_no_launch_buttons(tmp_path):
    config = tmp_path / "_config.yml"
    config.write_text("title: a\n")
    assemble.add_launch_buttons(config, None, "https://hub.example.org")
    assert config.read_text() == "title: a\n"


def test_the_book_is_assembled_without_what_its_models_need():
    modules = ["pages", *(path.stem for path in (ROOT / "book/_ext").glob("*.py"))]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    places = [ROOT, ROOT / "workflow", ROOT / "book/_ext"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places))}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
