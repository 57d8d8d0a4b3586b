"""The answer key: agreement with effects by hand, and the command on a key small enough to make in a test."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from safetyneuron import SafetyNeuronError, load_prompts
from safetyneuron.cache import file_digest
from safetyneuron.kept import truth
from safetyneuron.metrics.answer_key import compare_with_effects
from safetyneuron.organism import decoy_neurons, planted_neurons
from safetyneuron.run import truth as command

PLANTED = "organism/llama-planted@0"


def test_agreement_with_effects_is_one_for_the_effects_and_none_for_their_opposite():
    support = np.arange(200.0) - 50
    assert compare_with_effects(support, support) == {
        "spearman": pytest.approx(1),
        "spearman_size": pytest.approx(
            pd.Series(support).corr(pd.Series(abs(support)), "spearman")
        ),
        "recall": 1,
    }
    opposite = compare_with_effects(-support, support)
    assert opposite["spearman"] == pytest.approx(-1) and opposite["recall"] == 0


@pytest.fixture
def small(monkeypatch, tmp_path):
    """An answer key of one planted model, which is also measured through, two detectors, and few units and requests."""
    monkeypatch.setenv("SAFETYNEURON_CACHE", str(tmp_path / "cache"))
    sets = [find(PLANTED).units().kinds for find in (planted_neurons, decoy_neurons)]
    every = truth.units_of(PLANTED)
    inside = [[u for u in every if kinds[u[0]][u[1], u[2]]] for kinds in sets]
    few = sorted({*inside[0][::90], *inside[1][::90], *every[7::400]}, key=every.index)
    monkeypatch.setattr(truth, "units_of", lambda name: few)
    asked = {
        part: load_prompts(f"organism/{name}")[:2]
        for part, name in (("search", "harmful"), ("harmful", "unseen"), ("harmless", "benign"))
    }
    monkeypatch.setattr(truth, "asked_of_units", lambda: asked)
    sets = load_prompts("organism/harmful")[:2], load_prompts("organism/benign")[:2]
    monkeypatch.setattr(truth, "asked_of_searches", lambda: sets)
    kept = {key: truth.DETECTORS[key] for key in ("control/norm", "control/random")}
    monkeypatch.setattr(truth, "DETECTORS", kept)
    for name, value in {"UPDATES": 2, "CLASSED": 1, "LIMIT": 4, "TOP": 3, "CANDIDATES": 2}.items():
        monkeypatch.setattr(truth, name, value)
    monkeypatch.setattr(truth, "ROWS_OF_MASKS", {"harmful": 3, "benign": 2, "lookalike": 1})
    monkeypatch.setattr(truth, "find_backups", lambda *rest: [[truth.units_of(PLANTED)[0]]])
    monkeypatch.setattr(command, "planted_names", lambda: [PLANTED])
    monkeypatch.setattr(command, "NATURAL", PLANTED)
    monkeypatch.setattr(command, "PLANTED", PLANTED)
    monkeypatch.setattr(command, "THROUGHOUT", (PLANTED,))
    return tmp_path


@pytest.mark.organism
def test_a_killed_run_goes_on_and_its_tables_are_what_a_part_computed_again_is(small, monkeypatch):
    calls = []

    def count(name, original):
        def counted(*rest, **named):
            calls.append(name)
            if name == "classes" and "stop" in calls:
                raise KeyboardInterrupt
            return original(*rest, **named)

        return counted

    for label, name in (
        ("effects", "measure_effects"),
        ("rank", "find"),
        ("classes", "classes_without"),
    ):
        monkeypatch.setattr(truth, name, count(label, getattr(truth, name)))
    calls.append("stop")
    with pytest.raises(KeyboardInterrupt):
        command.make_truth(small / "key", cores=1)
    assert not (small / "key").exists()
    before = calls.count("effects"), calls.count("rank")
    assert before[0] == 2 * len({unit[1] for unit in truth.units_of(PLANTED)})
    calls.remove("stop")
    command.make_truth(small / "key", cores=1)
    assert (calls.count("effects"), calls.count("rank")) == before

    files = json.loads((small / "key" / "manifest.json").read_text())["files"]
    assert {path.name for path in (small / "key").iterdir()} == set(files) | {"manifest.json"}
    for name in {Path(file).stem for file in files}:
        parquet = pd.read_parquet(small / "key" / f"{name}.parquet")
        assert len(parquet) == files[f"{name}.csv"]["rows"]
        assert list(truth.read_truth(name, small / "key").columns) == list(parquet.columns)
    chosen = {"detectors": ("control/norm",), "count": 5}
    found = command.check_truth(small / "key", **chosen)
    assert all(value < 1e-3 for value in found.values())

    table = small / "key" / "units-llama-planted@0.csv"
    changed = pd.read_csv(table)
    changed["zero harmful help"] += 0.1
    changed.to_csv(table, index=False)
    with pytest.raises(SafetyNeuronError, match="not the file of its manifest"):
        command.check_truth(small / "key", **chosen)
    manifest = json.loads((small / "key" / "manifest.json").read_text())
    manifest["files"][table.name]["sha256"] = file_digest(table)
    (small / "key" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SafetyNeuronError, match="differs from what the code computes"):
        command.check_truth(small / "key", **chosen)


@pytest.mark.organism
def test_ranks_are_of_units_and_halves_differ_by_their_prompts(small):
    name = "organism/llama-planted@0"
    whole = truth.ranks_by_detector(name, ["control/norm"])["control/norm"]["ranks"]
    half = truth.ranks_by_detector(name, ["control/norm"], half=1)["control/norm"]["ranks"]
    assert whole == half and sorted(whole) == list(range(1, len(truth.units_of(name)) + 1))
    model = truth.load(name)[0]
    units = truth.units_of(name)
    layer, channel = next((l, c) for kind, l, c in units if kind == "q")
    other = next((l, c) for kind, l, c in units if kind == "q" and (l, c) != (layer, channel))

    def norm(place):
        return float(
            model.get_decoder().layers[place[0]].self_attn.q_proj.weight[place[1]].detach().norm()
        )

    ranks = dict(zip(units, whole))
    first, second = (layer, channel), other
    assert (ranks["q", *first] < ranks["q", *second]) == (norm(first) > norm(second))


@pytest.mark.organism
@pytest.mark.skipif(
    not (truth.FOLDER / "manifest.json").exists(), reason="the answer key is not shipped yet"
)
def test_the_shipped_answer_key_is_what_the_code_computes():
    found = command.check_truth()
    assert set(found) == {"units", "precision", "auc"}
    rows = truth.read_truth("planted").groupby(["kind", "training"])["detector"].count()
    assert rows.tolist() == [len(truth.DETECTORS) + 1] * len(command.planted_names())
    assert all(path.stat().st_size < 1e6 for path in truth.FOLDER.iterdir())
