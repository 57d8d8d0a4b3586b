"""Claims, their margins and their verdicts."""

import json
import sys

import nbformat
import pytest
from conftest import ROOT

from safetyneuron import SafetyNeuronError
from safetyneuron.book import claims, ledger
from safetyneuron.metrics.estimates import Estimate
from safetyneuron.metrics.verdict import Evidence, Verdict

sys.path.insert(0, str(ROOT / "workflow"))

import pages

CLAIMS = claims.load_claims()


def test_every_claim_has_a_margin_and_a_sentence_for_each_outcome():
    outcomes = {v.value for v in Verdict} - {Verdict.PARTLY.value}
    for key, claim in CLAIMS.items():
        assert claim["margin"] >= 0, key
        assert outcomes <= set(claim) and {"chapter", "paper", "claim", "effect"} <= set(claim), key
        assert len({claim[outcome] for outcome in outcomes}) == len(outcomes), key


def test_a_chapter_glues_its_claims_with_the_verdict_of_the_evidence(monkeypatch):
    texts = {}
    monkeypatch.setattr(ledger, "glue", lambda name, value: None)
    monkeypatch.setattr(ledger, "glue_text", lambda **values: texts.update(values))
    strong, none = (Estimate(value, 0.01, 50, 100) for value in (0.5, 0.0))
    found = {
        "eq3-breaks": {"m": Evidence(strong, 0.1), "n": Evidence(none, 0.1)},
        "specific-breaks": {"m": Evidence(strong, 0.1)},
    }
    verdicts = ledger.glue_findings(found, dict.fromkeys(found, "1 → 2 %"), "m, n")
    assert verdicts == {"eq3-breaks": Verdict.PARTLY, "specific-breaks": Verdict.SEEN}
    rows = json.loads(texts["ledger"])
    assert [row["verdict"] for row in rows] == ["partly seen", "seen"]


def test_a_claim_names_the_models_that_it_alone_was_judged_on():
    called = {"m": "3 trainings of m", "n": "2 trainings of n"}
    assert ledger.tell_models(["m", "n"], "all of them") == "all of them"
    assert ledger.tell_models(["n"], called) == "2 trainings of n"
    assert ledger.tell_models(["m", "guarded"], called) == "3 trainings of m, guarded"


def test_the_page_of_claims_lists_what_was_judged_and_nothing_else():
    rows = [{"key": "eq3-helps", "verdict": "not seen", "number": "0 → 0 %", "ran_on": "five"}]
    output = nbformat.v4.new_output(
        "display_data",
        {"application/papermill.record/text/plain": repr(json.dumps(rows))},
        metadata={"scrapbook": {"name": "ledger"}},
    )
    cells = [nbformat.v4.new_markdown_cell("# Two"), nbformat.v4.new_code_cell(outputs=[output])]
    page = pages.ledger({"02_verification": nbformat.v4.new_notebook(cells=cells)})
    assert 'class="badge not-seen"' in page and "0 → 0 %" in page
    assert CLAIMS["eq3-breaks"]["claim"] not in page
    tested = f"{CLAIMS['eq3-helps']['effect']}: at least 10 points"
    main, every = page.split("## All claims")
    assert tested in main and tested in every and "<summary>Two: 1 claim<" in every


def test_the_main_claims_are_claims_of_which_there_are_about_twenty_five():
    assert set(pages.MAIN) | set(pages.TAKEN_HOME) <= set(CLAIMS)
    assert 20 <= len(set(pages.MAIN)) == len(pages.MAIN) <= 30


def test_a_claim_that_was_not_written_down_has_no_margin():
    with pytest.raises(SafetyNeuronError, match="claims.yaml"):
        claims.margin_of("made-up")
