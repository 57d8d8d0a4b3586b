"""Importance over a corpus: a running minimum and mean over prompts."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safetyneuron.cache import digest
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.importance.recorder import RULES, Recorder, recording
from safetyneuron.importance.selection import select_fraction, select_per_layer
from safetyneuron.memory import Batches
from safetyneuron.neurons.architecture import PROJECTIONS
from safetyneuron.neurons.encoding import encode_prompts, pad
from safetyneuron.neurons.files import read_tensors, write_tensors
from safetyneuron.neurons.identity import identity, tokenizer_digest
from safetyneuron.neurons.sets import NeuronSet
from safetyneuron.neurons.weights import fingerprint
from safetyneuron.progress import steps

CHECKPOINT_BATCHES = 20


@dataclass
class ImportanceProfile:
    """Importance of every neuron over a corpus.

    A neuron belongs to the intersection over prompts {importance ≥ ε} (Zhao et al. 2025, Eq 3) exactly when its
    minimum over prompts is ≥ ε, so the minimum answers Eq 3 for every ε at once.

    Attributes
    ----------
    minimum, total : dict of str to torch.Tensor
        Minimum and float64 sum over prompts, (layers, channels) per projection `q k v o gate up down`. The rules `exact`
        and `first_order` are in units of the residual stream.
    count : int
        Prompts measured.
    rule, model, tokenizer : str
        The importance rule, and fingerprints of what was measured.
    prefix : dict of int to dict
        Minimum over the first so many prompts, for the sizes asked for.
    """

    minimum: dict
    total: dict
    count: int
    rule: str
    model: str
    tokenizer: str
    prefix: dict = field(default_factory=dict)

    @property
    def mean(self) -> dict[str, torch.Tensor]:
        """Mean over prompts, like `minimum`."""
        return {p: (total / self.count).float() for p, total in self.total.items()}

    def add(self, scores: dict[str, torch.Tensor], positions: list[int]) -> None:
        """Take in a batch: scores (B, layers, channels) per projection, positions in the corpus of its prompts."""
        lowest = {p: x.amin(0) for p, x in scores.items()}
        self.minimum = lower(self.minimum, lowest)
        self.total = {p: self.total.get(p, 0) + x.double().sum(0) for p, x in scores.items()}
        self.count += len(positions)
        for size, minimum in self.prefix.items():
            inside = torch.tensor([position < size for position in positions])
            if inside.any():
                self.prefix[size] = lower(
                    minimum, {p: x[inside].amin(0) for p, x in scores.items()}
                )

    def merge(self, other: "ImportanceProfile") -> "ImportanceProfile":
        """The profile of two corpora together, for shards measured apart; prefixes belong to one corpus and are dropped.

        Raises
        ------
        SafetyNeuronError
            If the two were made with another model, tokenizer or rule.
        """
        self.check_like(other)
        total = {p: self.total[p] + other.total[p] for p in PROJECTIONS}
        minimum = lower(self.minimum, other.minimum)
        return ImportanceProfile(
            minimum, total, self.count + other.count, self.rule, self.model, self.tokenizer
        )

    def check_like(self, other: "ImportanceProfile") -> None:
        """Refuse a profile of another model, tokenizer or rule: their numbers cannot be compared."""
        for what in ("model", "tokenizer", "rule"):
            if getattr(self, what) != getattr(other, what):
                raise SafetyNeuronError(
                    f"the profiles were made with another {what}: measure both alike"
                )

    def select(
        self,
        threshold: float | None = None,
        fraction: float | None = None,
        per_layer: int | None = None,
    ) -> NeuronSet:
        """The safety neurons: give exactly one of the three.

        Parameters
        ----------
        threshold : float, optional
            ε of Eq 2: minimum importance at or above it.
        fraction : float, optional
            Share of all neurons, in (0, 1], with the largest minimum.
        per_layer : int, optional
            That many per layer and projection, as the paper's released code does.

        Returns
        -------
        NeuronSet

        Raises
        ------
        SafetyNeuronError
            If not exactly one is given or one is out of range.
        """
        if sum(x is not None for x in (threshold, fraction, per_layer)) != 1:
            raise SafetyNeuronError("select needs exactly one of threshold, fraction, per_layer")
        if threshold is not None:
            return NeuronSet({p: scores >= threshold for p, scores in self.minimum.items()})
        if fraction is not None:
            return select_fraction(self.minimum, fraction)
        return select_per_layer(self.minimum, per_layer)

    def save(self, path: str | Path, **facts) -> None:
        """Write the profile to a safetensors file."""
        groups = {"minimum": self.minimum, "total": self.total} | {
            f"prefix {n}": m for n, m in self.prefix.items()
        }
        tensors = {f"{group}.{p}": x for group, values in groups.items() for p, x in values.items()}
        facts |= {
            "count": self.count,
            "rule": self.rule,
            "model": self.model,
            "tokenizer": self.tokenizer,
            "sizes": list(self.prefix),
        }
        write_tensors(path, "importance profile", tensors, facts)

    @classmethod
    def load(cls, path: str | Path) -> "ImportanceProfile":
        """Read a file written by `save`."""
        return cls._read(path)[0]

    @classmethod
    def _read(cls, path):
        """The profile in a file, and the facts stored beside it."""
        cure = "remove it and measure again"
        with read_tensors(path, "importance profile", cure) as (tensors, facts):

            def group(g):
                return {p: tensors[f"{g}.{p}"] for p in PROJECTIONS if f"{g}.{p}" in tensors}

            prefix = {size: group(f"prefix {size}") for size in facts["sizes"]}
            fields = [facts[name] for name in ("count", "rule", "model", "tokenizer")]
            return cls(group("minimum"), group("total"), *fields, prefix), facts


def lower(
    first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Elementwise minimum of two dicts of tensors; an empty one is neutral."""
    return {p: torch.minimum(first[p], x) if p in first else x for p, x in second.items()}


def measure_importance(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    rule: str = "exact",
    batch_size: int = 16,
    progress: bool = True,
    sizes: Iterable[int] = (),
    checkpoint: str | Path | None = None,
) -> ImportanceProfile:
    """Importance of every neuron of `model` for every prompt, in one forward pass per batch.

    Parameters
    ----------
    model, tokenizer : transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase
        The chat template formats the prompts; without one they are used as they are.
    prompts : list of str
    rule : {'exact', 'first_order', 'paper', 'released'}
    batch_size : int
        Prompts a forward pass; the result does not depend on it.
    progress : bool
        Whether to print a line every ten seconds.
    sizes : sequence of int
        Corpus sizes whose prefix minima to keep (Table 5).
    checkpoint : path, optional
        File to write every 20 batches; if it exists, the measurement goes on from it to the same result, bit for bit.

    Returns
    -------
    ImportanceProfile

    Raises
    ------
    SafetyNeuronError
        If there are no prompts, one is longer than the context, the rule is unknown, the checkpoint is another's, or importance is
        not finite.
    UnsupportedArchitecture
        If the model is not in the architecture table.
    """
    if rule not in RULES:
        raise SafetyNeuronError(f"unknown importance rule {rule!r}: use one of {', '.join(RULES)}")
    encoded = encode_prompts(model, tokenizer, prompts)
    batches = by_length(encoded, batch_size)
    profile = ImportanceProfile({}, {}, 0, rule, fingerprint(model), tokenizer_digest(tokenizer))
    profile.prefix = {size: {} for size in sizes}
    done, total, task = 0, len(batches), None
    if checkpoint:
        task = digest(identity(model, tokenizer, __name__), rule, encoded, batch_size, list(sizes))
    if checkpoint and Path(checkpoint).exists():
        profile, done = _resume(checkpoint, task)
    with torch.inference_mode(), recording(model, rule) as recorder:
        batches = steps(batches[done:], "importance", progress)
        for index, (positions, scores) in enumerate(
            scored(model, tokenizer, encoded, batches, recorder), done + 1
        ):
            profile.add(scores, positions)
            if checkpoint and (index % CHECKPOINT_BATCHES == 0 or index == total):
                profile.save(checkpoint, task=task, done=index)
    check_finite(profile.total, rule)
    return profile


def check_finite(scores: dict[str, torch.Tensor], rule: str) -> None:
    """Refuse importance that cannot be ranked. scores: dict of tensors."""
    bad = sum(int((~x.isfinite()).sum()) for x in scores.values())
    if bad:
        raise SafetyNeuronError(
            f"the importance of {bad} neurons is not a number: the weights hold NaN or infinities, or {rule} overflows in this dtype; load the model again, in float32"
        )


def by_length(encoded: list[list[int]], batch_size: int) -> list[list[int]]:
    """Positions of the prompts in batches of similar length."""
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def scored(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: list[list[int]],
    batches: Iterable[list[int]],
    recorder: Recorder,
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Run the batches and yield each with its scores: (positions, dict of (B, layers, channels))."""
    fitting = Batches(sys.maxsize)  # as large as they come, until one does not fit
    for positions in batches:
        parts = [
            scores
            for _, scores in fitting(
                positions,
                lambda some: _score(model, tokenizer, [encoded[i] for i in some], recorder),
            )
        ]
        yield positions, {p: torch.cat([scores[p] for scores in parts]) for p in parts[0]}


def _score(model, tokenizer, encoded, recorder):
    """Scores of one batch."""
    batch = pad(encoded, tokenizer, model.device)
    recorder.start(batch["attention_mask"])
    positions_read = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(
        0
    )  # counted from the first real token
    model.get_decoder()(**batch, position_ids=positions_read, use_cache=False)
    return recorder.finish()


def _resume(checkpoint, task):
    """The profile so far and the number of batches it holds."""
    profile, facts = ImportanceProfile._read(checkpoint)
    if facts.get("task") != task:
        raise SafetyNeuronError(
            f"checkpoint {checkpoint} belongs to other prompts, another model, rule, batch size or list of sizes, or other code: remove it, name another file, or give what it was begun with"
        )
    return profile, facts["done"]
