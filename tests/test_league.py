"""The league: scores of a function of one's own, held against planted neurons."""

import pytest
import torch

from safetyneuron import SafetyNeuronError
from safetyneuron.cli import main
from safetyneuron.detectors.detect import Detector
from safetyneuron.detectors.league import judge, load_finder, play
from safetyneuron.neurons.sets import NeuronSet
from safetyneuron.organism import decoy_neurons, planted_neurons

NAME = "organism/llama-planted"
pytestmark = pytest.mark.organism


def test_a_perfect_detector_a_blind_one_and_one_that_takes_decoys():
    planted, decoys = planted_neurons(NAME), decoy_neurons(NAME)
    draw = torch.Generator().manual_seed(0)
    noise = {p: torch.rand(m.shape, generator=draw) for p, m in planted.masks.items()}
    perfect = judge(Detector({p: m + noise[p] for p, m in planted.masks.items()}), planted, decoys)
    assert perfect["precision"] == perfect["average precision"] == perfect["auc"] == 1
    misled = judge(Detector({p: m + noise[p] for p, m in decoys.masks.items()}), planted, decoys)
    assert misled["precision"] < 0.02 and misled["auc"] == 0
    blind = judge(Detector(noise), planted, decoys)
    share = len(planted.units()) / planted.units().total
    assert blind["chance precision"] == share
    assert blind["precision"] == pytest.approx(share, abs=0.04)
    assert blind["auc"] == pytest.approx(0.5, abs=0.1)


def test_a_small_case_by_hand():
    shapes = {p: (1, 4) for p in ("q", "k", "v", "o", "gate", "up", "down")}
    planted, decoys = (NeuronSet.from_cells(shapes, [("up", 0, c)]) for c in (0, 1))
    scores = {p: torch.zeros(shape) for p, shape in shapes.items()}
    scores["down"] = torch.tensor([[2.0, 1.0, 3.0, 0.0]])  # of the same unit as the planted row
    found = judge(Detector(scores), planted, decoys)
    assert found == {"precision": 0, "average precision": 0.5, "auc": 1, "chance precision": 1 / 16}


def test_a_file_is_played_from_the_command_line(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(
        "from safetyneuron.neurons.activations import channel_means\n\n\n"
        "def find(model, tokenizer, harmful, benign):\n"
        "    assert len(harmful) == len(benign) == 4\n"
        "    first, second = (channel_means(model, tokenizer, x) for x in (harmful, benign))\n"
        "    return {p: (first[p] - second[p]).abs() for p in first}\n"
    )
    assert main(["league", str(path), "-m", NAME, "-n", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = play(load_finder(path), NAME, 4)
    assert lines[1].split()[:4] == [
        NAME,
        *(f"{expected[x]:.2f}" for x in ("precision", "average precision", "auc")),
    ]


@pytest.mark.parametrize(
    "text, model, message",
    [
        ("find = 3", NAME, "defines no function find"),
        ("def find(*x): return None", NAME, "returned NoneType"),
        ("def find(*x): return {}", "organism/llama-chat", "planted"),
        (None, NAME, "no file"),
    ],
)
def test_what_cannot_be_played_gets_one_line(tmp_path, capsys, text, model, message):
    path = tmp_path / "mine.py"
    if text:
        path.write_text(text)
    assert main(["league", str(path), "-m", model, "-n", "2"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_file_that_is_no_python_file_is_refused(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("def find(): pass")
    with pytest.raises(SafetyNeuronError, match="ends with .py"):
        load_finder(path)
