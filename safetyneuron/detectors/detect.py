"""Every way of finding safety neurons behind one protocol: a score per neuron, and from a budget a set of neurons."""

from dataclasses import dataclass, replace
from functools import partial

import torch

from safetyneuron.data.documents import load_documents
from safetyneuron.data.prompts import load_prompts
from safetyneuron.detectors.case import Case
from safetyneuron.detectors.consensus import unflatten
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.importance.selection import ranks, select_units, unit_scores
from safetyneuron.neurons.architecture import PROJECTIONS
from safetyneuron.neurons.files import read_tensors, write_tensors
from safetyneuron.neurons.sets import NeuronSet


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

    @property
    def ranking(self):
        """One number a functional unit, (layers, channels) per kind, for measures of a whole ranking.

        The scores, or how many ranks higher a unit stands than among what is left out.
        """
        scores = unit_scores(self.scores)
        if self.others is None:
            return scores
        return unflatten(ranks(unit_scores(self.others)) - ranks(scores), scores)

    def select(self, fraction):
        """The set at a budget, a share of all functional units; None where too few are left after the difference."""
        return select_units(self.scores, fraction, self.others)

    def save(self, path):
        """Write the ranking to a safetensors file."""
        groups = {"scores": self.scores} | ({"others": self.others} if self.others else {})
        tensors = {  # projections may share one tensor, which a file must not
            f"{group}.{p}": x.clone() for group, of in groups.items() for p, x in of.items()
        }
        write_tensors(path, "ranking", tensors, {"seconds": self.seconds, "passes": self.passes})

    @classmethod
    def load(cls, path):
        """Read a file written by `save`."""
        with read_tensors(path, "ranking", "remove it and detect again") as (tensors, facts):
            groups = [
                {p: tensors[f"{group}.{p}"] for p in PROJECTIONS if f"{group}.{p}" in tensors}
                for group in ("scores", "others")
            ]
            return cls(groups[0], groups[1] or None, facts["seconds"], facts["passes"])


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

    def case(self, model, tokenizer, base=None, languages=()):
        """All of it loaded, for one model.

        languages : sequence of str
            Others in which harmful and benign requests are loaded too.
        """
        others = {x: replace(self, language=x) for x in languages if x != self.language}
        return Case(
            model,
            tokenizer,
            *(self.prompts(name) for name in (self.harmful, self.benign, self.general)),
            *(self.documents(name) for name in (self.refusals, self.helpful)),
            base,
            {x: (d.prompts(d.harmful), d.prompts(d.benign)) for x, d in others.items()},
        )


def find(rule, case, key="of your own"):
    """Run a rule on a case, hold what it returns against the model, and count what it took.

    Parameters
    ----------
    rule : table.Rule
    case : Case
    key : str
        What error messages call the rule.

    Returns
    -------
    Detector

    Raises
    ------
    SafetyNeuronError
        If the case lacks what the rule needs, or the scores cannot rank the model's neurons.
    """
    case.check_has(rule.needs, key)
    found, seconds = case.timed(lambda: rule.find(case))
    sides = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    scores, others = (
        x if x is None and i else check_scores(x, case.model, key) for i, x in enumerate(sides)
    )
    _, plain = case.timed(partial(case.once, "plain pass", case.plain_pass))
    return Detector(scores, others, seconds, seconds / plain)


def check_scores(scores, model, key):
    """The scores as tensors, if they give every neuron of the model one number.

    Raises
    ------
    SafetyNeuronError
        Says what is missing, of another shape or not a number.
    """
    shapes = NeuronSet.empty(model).shapes
    if not isinstance(scores, dict) or set(scores) != set(shapes):
        given = (
            f"a dict with {' '.join(map(str, scores)) or 'nothing'}"
            if isinstance(scores, dict)
            else type(scores).__name__
        )
        raise SafetyNeuronError(
            f"detector {key} returned {given}: it must return a dict with scores for {' '.join(shapes)}"
        )
    checked = {p: _as_tensor(scores[p], p, key) for p in shapes}
    for p, shape in shapes.items():
        if tuple(checked[p].shape) != shape:
            raise SafetyNeuronError(
                f"detector {key} returned scores of shape {tuple(checked[p].shape)} for {p}: it must be (layers, channels) = {shape}"
            )
        if bad := int((~checked[p].isfinite()).sum()):
            raise SafetyNeuronError(
                f"detector {key} returned {bad} scores for {p} that are not finite numbers: give every neuron a finite one, the lowest to what is never to be selected"
            )
    return checked


def _as_tensor(values, projection, key):
    try:
        return torch.as_tensor(values).detach().cpu().float()
    except (TypeError, ValueError, RuntimeError) as error:
        raise SafetyNeuronError(
            f"detector {key} returned scores for {projection} that are no numbers ({error}): return tensors or arrays"
        ) from None
