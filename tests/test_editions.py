"""Editions: one may extend another."""

import pytest
import yaml
from conftest import ROOT

from safetyneuron.data import sources
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.run.editions import read_edition

EDITIONS = ROOT / "workflow" / "editions"


def test_an_edition_takes_from_the_one_it_extends_what_it_does_not_say():
    paper, attacks = (
        read_edition(EDITIONS / f"{name}.yaml") for name in ("paper", "paper-attacks")
    )
    assert paper["notebooks"]["05_sn_tune_instruct"]["n_attacked"] == 0
    assert attacks["notebooks"]["05_sn_tune_instruct"]["n_attacked"] == 100
    assert attacks["edition"] == "paper-attacks" and attacks["hardware"] == paper["hardware"]
    for edition in (paper, attacks):
        for name in ("05_sn_tune_instruct", "06_sn_tune_base"):
            for key in ("n_attacked", "starts"):
                edition["notebooks"][name].pop(key, None)
    assert attacks["notebooks"] == paper["notebooks"] and "extends" not in attacks


@pytest.mark.parametrize("name", ["02_verification", "05_sn_tune_instruct", "06_sn_tune_base"])
def test_tables_1_to_3_of_the_paper_edition_ask_whole_sets_that_nothing_learns_from(name):
    given = read_edition(EDITIONS / "paper.yaml")["notebooks"][name]
    asked = given.get("test_sets") or [given["harmful_set"]]
    sets = [sources.SOURCES[sources.PROMPTS[one][0]] for one in asked]
    learnt = {given.get(key) for key in ("detect_set", "document_set", "rerouting_set")} - {None}
    learnt |= {given["harmful_set"]} - set(asked)
    known = sources.PROMPTS | sources.DOCUMENTS
    files = {sources.SOURCES[known[one][0]].file for one in learnt}
    for source in sets:
        assert sources.splits_of(source) == ("test",) and source.file not in files
        assert {sources.SOURCES[sources.PROMPTS[source.apart][0]].file} == files
    assert given["n_prompts"] >= 520  # of AdvBench, the largest of them


def test_an_edition_that_extends_none_that_exists_is_one_clear_line(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({"extends": "b", "notebooks": {}}), encoding="utf-8")
    with pytest.raises(SafetyNeuronError, match="b.yaml cannot be read"):
        read_edition(path)
