"""Editions: one may extend another."""

import pytest
import yaml
from conftest import ROOT

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


def test_an_edition_that_extends_none_that_exists_is_one_clear_line(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({"extends": "b", "notebooks": {}}), encoding="utf-8")
    with pytest.raises(SafetyNeuronError, match="b.yaml cannot be read"):
        read_edition(path)
