"""Every way of finding safety neurons behind one protocol: a score per neuron, and from a budget a set of neurons."""

import time
from dataclasses import dataclass
from functools import partial

import torch

from safetyneuron.data.documents import load_documents
from safetyneuron.data.prompts import load_prompts
from safetyneuron.detectors.change_scores import change_scores
from safetyneuron.detectors.direction import alignment_with, refusal_directions
from safetyneuron.detectors.saliency import snip, wanda
from safetyneuron.importance.profile import measure_importance
from safetyneuron.importance.recorder import RULES
from safetyneuron.importance.selection import select_units
from safetyneuron.memory import Batches
from safetyneuron.neurons.architecture import PROJECTIONS
from safetyneuron.neurons.encoding import encode_prompts, pad
from safetyneuron.neurons.sets import NeuronSet, unit_kinds

VARIANTS = ("Eq 3", "without foundation", "harmful − benign")
CHANGE, DIRECTION, RANDOM, MATCHED = (
    "change score",
    "refusal direction",
    "random",
    "random, matched",
)


@dataclass
class Detector:
    """A ranking of neurons.

    Attributes
    ----------
    scores : dict of str to torch.Tensor
        (layers, channels) per projection; the highest are selected.
    others : dict of str to torch.Tensor, optional
        Scores on other data, whose highest are left out (`select_units`).
    seconds, passes : float
        What detection took, and the same in plain forward passes of as many prompts.
    """

    scores: dict
    others: dict | None = None
    seconds: float = 0.0
    passes: float = 0.0

    def select(self, fraction):
        """The set at a budget, a share of all functional units; None where too few are left after the difference."""
        return select_units(self.scores, fraction, self.others)


@dataclass(frozen=True)
class Detection:
    """What all detectors see: prompt and document sets by name, how many of each, and the language."""

    harmful: str
    general: str
    benign: str
    refusals: str
    helpful: str
    count: int = 100
    language: str = "en"

    def prompts(self, name):
        """Prompts of the training split; general prompts are English."""
        return load_prompts(
            name, split="train", language="en" if name == self.general else self.language
        )[: self.count]

    def documents(self, name):
        """Documents of the training split."""
        return load_documents(name, language=self.language)[: self.count]


def detect(model, base, tokenizer, data, rules=RULES, draws=3):
    """Every detector on one model.

    Parameters
    ----------
    model, base : transformers.PreTrainedModel
        The aligned model, and the same before alignment, for change scores.
    data : Detection
    rules : sequence of str
        Readings of importance (Zhao et al. 2025).
    draws : int
        Random detectors of each kind.

    Returns
    -------
    dict of str to Detector
        Random ones are named with their draw; the matched ones follow the first rule without foundation neurons.
    """
    plain = _timed(partial(_plain_passes, model, tokenizer, data.prompts(data.harmful)))[1]
    found = {}
    for rule in rules:
        found |= _by_importance(model, tokenizer, data, rule)
    for name, saliency in (("SNIP", snip), ("Wanda", wanda)):
        safe, first = _timed(partial(saliency, model, tokenizer, data.documents(data.refusals)))
        useful, second = _timed(partial(saliency, model, tokenizer, data.documents(data.helpful)))
        found[f"{name}, safety − utility"] = Detector(safe, useful, first + second)
    harmful, benign = data.prompts(data.harmful), data.prompts(data.benign)
    changed, seconds = _timed(
        lambda: change_scores(base, model, tokenizer, harmful).over_projections()
    )
    found[CHANGE] = Detector(changed, None, seconds)
    aligned, seconds = _timed(
        lambda: alignment_with(model, refusal_directions(model, tokenizer, harmful, benign))
    )
    found[DIRECTION] = Detector(aligned, None, seconds)
    for detector in found.values():
        detector.passes = detector.seconds / plain
    return found | random_detectors(found[f"{rules[0]}, {VARIANTS[1]}"], draws)


def _timed(work):
    """Result and seconds."""
    started = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def _by_importance(model, tokenizer, data, rule):
    def measure(name):
        return _timed(
            partial(measure_importance, model, tokenizer, data.prompts(name), rule, progress=False)
        )

    (harmful, first), (general, second), (benign, third) = (
        measure(name) for name in (data.harmful, data.general, data.benign)
    )
    contrast = {p: harmful.mean[p] - benign.mean[p] for p in PROJECTIONS}
    return {
        f"{rule}, {VARIANTS[0]}": Detector(harmful.minimum, None, first),
        f"{rule}, {VARIANTS[1]}": Detector(harmful.minimum, general.minimum, first + second),
        f"{rule}, {VARIANTS[2]}": Detector(contrast, None, first + third),
    }


@torch.no_grad()
def _plain_passes(model, tokenizer, prompts, batch_size=16):
    encoded = sorted(encode_prompts(model, tokenizer, prompts), key=len)
    for _ in Batches(batch_size)(
        encoded,
        lambda some: model.get_decoder()(**pad(some, tokenizer, model.device), use_cache=False),
    ):
        pass


class _Matched(Detector):
    """Random units beside another detector's set, as many per layer and kind, drawn anew at every budget."""

    def __init__(self, pattern, seed):
        super().__init__(random_scores(pattern.scores, seed))
        self.pattern, self.seed = pattern, seed

    def select(self, fraction):
        chosen = self.pattern.select(fraction)
        if chosen is None or not chosen.units().leave_room:
            return None
        return NeuronSet.random_like(chosen, self.seed)


def random_scores(scores, seed):
    """Uniform scores of functional units, the same for all rows and columns of one, in the shape of others."""
    generator, drawn = torch.Generator().manual_seed(seed), {}
    for projections in unit_kinds({p: score.shape for p, score in scores.items()}).values():
        values = torch.rand(scores[projections[0]].shape, generator=generator)
        drawn |= dict.fromkeys(projections, values)
    return {p: drawn[p] for p in PROJECTIONS}


def random_detectors(pattern, draws):
    """Uniformly random functional units, and random ones matched to a detector's sets."""
    uniform = {
        f"{RANDOM} {seed}": Detector(random_scores(pattern.scores, seed)) for seed in range(draws)
    }
    return uniform | {f"{MATCHED} {seed}": _Matched(pattern, seed) for seed in range(draws)}
