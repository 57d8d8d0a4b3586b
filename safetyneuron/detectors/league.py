"""Detectors held against planted neurons: the built-in ones, and a function of your own."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from safetyneuron.data.prompts import load_prompts
from safetyneuron.detectors.case import Case
from safetyneuron.detectors.detect import Detector, find
from safetyneuron.detectors.table import Rule
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.models import load_model
from safetyneuron.neurons.sets import NeuronSet
from safetyneuron.neurons.undisturbed import own_randomness
from safetyneuron.organism import decoy_neurons, planted_neurons

PLANTED = (
    "organism/llama-planted",
    "organism/llama-planted-attention",
    "organism/llama-planted-mlp",
)
FUNCTION = "find"


def judge(detector: Detector, planted: NeuronSet, decoys: NeuronSet) -> dict[str, float]:
    """How well a ranking finds planted neurons, in functional units.

    Returns
    -------
    dict of str to float
        `precision`: share of the set as large as the planted one that is planted, which is its recall too (NaN where the
        rule has no set of that size); `average precision` of the whole ranking; `auc`, the probability that a planted unit
        stands above a decoy; and what chance gives of each, `chance precision` (and average precision) and 0.5.
    """
    inside, others = planted.units(), decoys.units()
    chosen = detector.select(inside.share)
    right = (chosen & inside.neurons()).units() if chosen is not None else ()
    ranking, labels = _flat(detector.ranking), _flat(inside.kinds)
    either = labels | _flat(others.kinds)
    return {
        "precision": len(right) / len(inside) if chosen is not None else float("nan"),
        "average precision": float(average_precision_score(labels, ranking)),
        "auc": float(roc_auc_score(labels[either], ranking[either])),
        "chance precision": inside.share,
    }


def _flat(kinds):
    return np.concatenate([x.flatten().numpy() for x in kinds.values()])


def load_finder(path):
    """The function `find(model, tokenizer, harmful, benign)` of a Python file, which is run: it is code of your own.

    Raises
    ------
    SafetyNeuronError
        If there is no such file, or no such function in it.
    """
    path = Path(path)
    if not path.is_file():
        raise SafetyNeuronError(
            f"there is no file {path}: name a Python file that defines {FUNCTION}"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None:
        raise SafetyNeuronError(f"{path} is no Python file: give it a name that ends with .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, FUNCTION, None)):
        raise SafetyNeuronError(
            f"{path} defines no function {FUNCTION}: write def {FUNCTION}(model, tokenizer, harmful, benign)"
        )
    return getattr(module, FUNCTION)


def play(finder, name: str, count: int = 100) -> dict[str, float]:
    """What `judge` says of a function's scores on a planted organism, and the `seconds` and `passes` that they took.

    Parameters
    ----------
    finder : callable
        From model, tokenizer, harmful and benign requests to a dict of scores, (layers, channels) per projection.
    name : str
        `organism/llama-planted`, or another with planted neurons and decoys.
    count : int
        Requests of each kind, of the training split.

    Raises
    ------
    SafetyNeuronError
        If nothing is planted in that organism, or the scores cannot rank its neurons.
    """
    key = planted_neurons(name), decoy_neurons(name)
    requests = (
        load_prompts(f"organism/{kind}", split="train")[:count] for kind in ("harmful", "benign")
    )
    case = Case(*load_model(name), *requests)
    rule = Rule(
        lambda c: finder(c.model, c.tokenizer, list(c.harmful), list(c.benign)), "", "", "", ""
    )
    with own_randomness():
        torch.manual_seed(0)
        detector = find(rule, case, getattr(finder, "__name__", "of your own"))
    return judge(detector, *key) | {"seconds": detector.seconds, "passes": detector.passes}


def league_table(rows: dict[str, dict[str, float]]) -> str:
    """Lines of text: a heading, a row for every organism, and chance."""
    head = f"{'organism':34}{'precision':>10}{'AP':>7}{'AUC':>7}{'chance':>9}{'seconds':>10}{'passes':>9}"
    lines = [
        f"{name:34}{r['precision']:10.2f}{r['average precision']:7.2f}{r['auc']:7.2f}"
        f"{r['chance precision']:9.2f}{r['seconds']:10.1f}{r['passes']:9.1f}"
        for name, r in rows.items()
    ]
    note = "precision: of as many units as are planted, also the recall; chance: of precision and AP, .50 of AUC against decoys"
    return "\n".join([head, *lines, note])
