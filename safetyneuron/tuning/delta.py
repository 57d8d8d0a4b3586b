"""What SN-Tune leaves behind: the change of the trained rows and columns, small enough to mail and easy to take back."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from safetyneuron.errors import SafetyNeuronError
from safetyneuron.neurons.architecture import Architecture
from safetyneuron.neurons.files import read_tensors, write_tensors
from safetyneuron.neurons.sets import NeuronSet
from safetyneuron.neurons.weights import fingerprint


class NeuronDelta:
    """Changes to the neurons of one model; the model itself stays as it was until `merge`.

    >>> delta = sn_tune(model, tokenizer, documents, neurons)
    >>> with delta.merged(model):
    ...     attack_success_rate(model, tokenizer, prompts)

    Attributes
    ----------
    neurons : NeuronSet
    values : dict of (str, int) to torch.Tensor
        Projection and layer to (neurons, width of a row or column), float32 or wider, in the order of the channels.
    model : str
        Fingerprint of the model it was trained on.
    facts : dict
        What the training was: its schedule, documents, effective_updates, curve, and seconds since its start or resumption.
    """

    def __init__(self, neurons, values, model, facts):
        if not all(value.isfinite().all() for value in values.values()):
            raise SafetyNeuronError(
                "the trained rows hold numbers that are not finite: lower the learning rate or load the model in a wider dtype"
            )
        self.neurons, self.values, self.model, self.facts = neurons, values, model, facts
        self._merged = None  # (weak reference to the model, original rows)

    def __repr__(self):
        return f"NeuronDelta({len(self.neurons)} neurons, {self.parameters} parameters, ‖ΔW‖ = {self.norm:.3g})"

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(value.numel() for value in self.values.values())

    @property
    def norm(self) -> float:
        """‖ΔW‖, the Frobenius norm of the whole change: 0 means that no update happened."""
        return sum(float(value.double().square().sum()) for value in self.values.values()) ** 0.5

    def merge(self, model: PreTrainedModel):
        """Add the change to the weights of `model`, which must be the one it was trained on.

        A model in half precision rounds the sum, and a change far smaller than the weight vanishes; where less than half
        of ‖ΔW‖ would be left, nothing is merged.

        Raises
        ------
        SafetyNeuronError
            If the delta is merged already, the model is another, or rounding would swallow the change.
        """
        if self._merged and self._merged[0]() is not None:
            raise SafetyNeuronError("this delta is merged already: unmerge it first")
        if fingerprint(model) != self.model:
            raise SafetyNeuronError(
                "this delta was trained on another model, or on other weights or another dtype of it: load the model it was trained on"
            )
        rows = list(self._rows(model))
        originals = [weight[channels].clone() for weight, channels, _ in rows]
        changed = [_sum(original, value) for original, (_, _, value) in zip(originals, rows)]
        kept = (
            sum(
                float((after.double() - before.double()).square().sum())
                for after, before in zip(changed, originals)
            )
            ** 0.5
        )
        if kept < 0.5 * self.norm:
            raise SafetyNeuronError(
                f"{model.dtype} would keep {kept / self.norm:.0%} of this change: load the model with dtype='float32' before tuning"
            )
        with torch.no_grad():
            for (weight, channels, _), after in zip(rows, changed):
                weight[channels] = after
        self._merged = (weakref.ref(model), originals)

    def unmerge(self, model: PreTrainedModel):
        """Put the original rows and columns back, bit for bit in every dtype.

        Raises
        ------
        SafetyNeuronError
            If this delta is not merged into this model, or its rows have changed since.
        """
        if not self._merged or self._merged[0]() is not model:
            raise SafetyNeuronError(
                "this delta is not merged into this model: only the object that merged it can take it back"
            )
        rows, originals = list(self._rows(model)), self._merged[1]
        if not all(
            weight[channels].equal(_sum(original, value))
            for (weight, channels, value), original in zip(rows, originals)
        ):
            raise SafetyNeuronError(
                "the rows of this delta have changed since it was merged: load the original model again"
            )
        with torch.no_grad():
            for (weight, channels, _), original in zip(rows, originals):
                weight[channels] = original
        self._merged = None

    @contextmanager
    def merged(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """The tuned model for the length of a `with` block."""
        self.merge(model)
        try:
            yield model
        finally:
            self.unmerge(model)

    def _rows(self, model):
        """Weight (channels first), channels and change of every projection and layer with trained neurons."""
        architecture = Architecture(model)
        for (projection, layer), value in self.values.items():
            weight = architecture.place(layer, projection).weight.detach()
            yield (
                weight,
                self.neurons.masks[projection][layer].nonzero().flatten().to(weight.device),
                value.to(weight.device),
            )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the trained rows, their channels, and the model's fingerprint."""
        tensors = {}
        for (projection, layer), value in self.values.items():
            tensors[f"{projection}.{layer}.change"] = value
            tensors[f"{projection}.{layer}.channels"] = (
                self.neurons.masks[projection][layer].nonzero().flatten().int()
            )
        facts = {"model": self.model, "shapes": self.neurons.shapes, "facts": self.facts}
        write_tensors(path, "neuron delta", tensors, facts)

    @classmethod
    def load(cls, path: str | Path) -> "NeuronDelta":
        """Read a file written by `save`."""
        cells, values = [], {}
        cure = "write it again with NeuronDelta.save"
        with read_tensors(path, "neuron delta", cure) as (tensors, facts):
            for name in [name for name in tensors if name.endswith(".change")]:
                projection, layer = name.split(".")[:2]
                channels = tensors[f"{projection}.{layer}.channels"].long()
                cells.append((projection, int(layer), channels))
                values[projection, int(layer)] = tensors[name]
            neurons = NeuronSet.from_cells(facts["shapes"], cells)
            return cls(neurons, values, facts["model"], facts["facts"])


def _sum(original, value):
    """Changed rows in the dtype of the weights; the sum is taken in that of the change."""
    return (original.to(value.dtype) + value).to(original.dtype)
