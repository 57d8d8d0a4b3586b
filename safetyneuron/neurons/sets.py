"""Sets of neurons: one boolean mask (layers, channels) per projection; and the functional units that they make up."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import and_, or_, xor
from pathlib import Path

import torch
from transformers import PreTrainedModel

from safetyneuron.cache import digest
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.neurons.architecture import PROJECTIONS, Architecture
from safetyneuron.neurons.files import read_tensors, write_tensors

# Kind of unit -> the projections whose rows and columns of one channel cannot be switched off apart.
UNIT_KINDS = {
    "q": ("q",),
    "k": ("k",),
    "v": ("v",),
    "o": ("o",),
    "vo": ("v", "o"),
    "ffn": ("gate", "up", "down"),
}


def unit_kinds(shapes: dict) -> dict[str, tuple[str, ...]]:
    """Kinds of functional units of a model, and their projections. shapes: of `NeuronSet`."""
    own_values = tuple(shapes["v"]) == tuple(shapes["o"])  # every head has its own
    left_out = {"v", "o"} if own_values else {"vo"}
    return {kind: projections for kind, projections in UNIT_KINDS.items() if kind not in left_out}


class NeuronSet:
    """A set of neurons of one model shape.

    Combine sets with ``&``, ``|``, ``-`` and ``^``; ``len`` counts neurons, ``len(neurons.units())`` functional units.

    >>> attention = neurons.within(1, 4).only(ATTENTION)
    >>> neurons.share_in(ATTENTION), neurons.share_in(ATTENTION, units=True)

    Parameters
    ----------
    masks : dict of str to torch.Tensor
        Boolean (layers, channels) per projection name `q k v o gate up down`.
    """

    def __init__(self, masks):
        if set(masks) != set(PROJECTIONS):
            raise SafetyNeuronError(
                f"a neuron set needs the projections {' '.join(PROJECTIONS)}, got {' '.join(sorted(masks))}"
            )
        for name, mask in masks.items():
            if mask.dtype != torch.bool or mask.dim() != 2:
                raise SafetyNeuronError(
                    f"projection {name}: a boolean (layers, channels) mask is needed, got {mask.dtype} {tuple(mask.shape)}"
                )
        self.masks = {p: masks[p].cpu() for p in PROJECTIONS}

    @classmethod
    def empty(cls, model: PreTrainedModel) -> "NeuronSet":
        """The set without neurons, in the shape of `model`."""
        architecture = Architecture(model)
        layers = len(architecture.layers)
        return cls(
            {
                p: torch.zeros(layers, width, dtype=torch.bool)
                for p, width in architecture.widths.items()
            }
        )

    @classmethod
    def from_cells(cls, shapes: dict, cells: Iterable) -> "NeuronSet":
        """The set of given cells: (projection, layer from 0, channel or tensor of channels).

        shapes: (layers, channels) per projection, as `shapes` of another set of the model.
        """
        masks = {p: torch.zeros(shapes[p], dtype=torch.bool) for p in PROJECTIONS}
        for projection, layer, channel in cells:
            masks[projection][layer, channel] = True
        return cls(masks)

    @classmethod
    def random_like(cls, neurons: "NeuronSet", seed: int) -> "NeuronSet":
        """Random neurons outside the units of a set, matched to it in units per layer and kind (this book's Deact-R).

        Every drawn unit stands for one of the set and has the same of its rows and columns, so that the sizes match too.

        Raises
        ------
        SafetyNeuronError
            If a layer has fewer units of a kind outside the set than in it (`Units.leave_room` tells beforehand).
        """
        generator, cells = torch.Generator().manual_seed(seed), []
        for kind, mask in neurons.units().kinds.items():
            for layer, inside in enumerate(mask):
                own, free = (side.nonzero().flatten() for side in (inside, ~inside))
                if len(own) > len(free):
                    raise SafetyNeuronError(
                        f"layer {layer + 1} has {len(own)} units of {kind} in the set and {len(free)} outside, too few for"
                        " a random set beside it: choose a smaller set"
                    )
                drawn = free[torch.randperm(len(free), generator=generator)[: len(own)]]
                for p in UNIT_KINDS[kind]:
                    cells.append((p, layer, drawn[neurons.masks[p][layer, own]]))
        return cls.from_cells(neurons.shapes, cells)

    @classmethod
    def random_draws(cls, neurons: "NeuronSet", count: int) -> "list[NeuronSet]":
        """`count` sets by `random_like`; none where some layer leaves too few units outside the set."""
        room = neurons.units().leave_room
        return [cls.random_like(neurons, seed) for seed in range(count if room else 0)]

    def _combine(self, other, operation):
        if self.shapes != other.shapes:
            raise SafetyNeuronError(
                "the two neuron sets belong to models of different shapes: measure both on the same model"
            )
        return NeuronSet({p: operation(self.masks[p], other.masks[p]) for p in PROJECTIONS})

    def __and__(self, other):
        return self._combine(other, and_)

    def __or__(self, other):
        return self._combine(other, or_)

    def __xor__(self, other):
        return self._combine(other, xor)

    def __sub__(self, other):
        return self._combine(other, lambda mine, theirs: mine & ~theirs)

    def __eq__(self, other):
        return (
            isinstance(other, NeuronSet) and self.shapes == other.shapes and len(self ^ other) == 0
        )

    __hash__ = None

    def __len__(self):
        return sum(self.counts().values())

    def __repr__(self):
        return f"NeuronSet({len(self)} of {self.total} neurons, {self.share:.2%})"

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Mask shapes, projection name to (layers, channels)."""
        return {p: tuple(mask.shape) for p, mask in self.masks.items()}

    @property
    def total(self) -> int:
        """Neurons of the model, in the set or not."""
        return sum(mask.numel() for mask in self.masks.values())

    @property
    def share(self) -> float:
        """Share of the model's neurons (rows and columns) in the set, 0 to 1."""
        return len(self) / self.total

    def counts(self) -> dict[str, int]:
        """Neurons in the set per projection."""
        return {p: int(mask.sum()) for p, mask in self.masks.items()}

    def within(self, first: int, last: int) -> "NeuronSet":
        """The neurons of layers `first` to `last`, counted from 1, both included.

        Raises
        ------
        SafetyNeuronError
            If the model has no such layers.
        """
        layers = len(self.masks["down"])
        if not 1 <= first <= last <= layers:
            raise SafetyNeuronError(
                f"there are no layers {first} to {last}: count from 1 to {layers}, the first of them first"
            )
        kept = {p: torch.zeros_like(mask) for p, mask in self.masks.items()}
        for projection, mask in self.masks.items():
            kept[projection][first - 1 : last] = mask[first - 1 : last]
        return NeuronSet(kept)

    def only(self, projections: Iterable[str]) -> "NeuronSet":
        """The neurons of some projections.

        Raises
        ------
        SafetyNeuronError
            If a name is none of `q k v o gate up down`.
        """
        names = {projections} if isinstance(projections, str) else set(projections)
        if unknown := names - set(PROJECTIONS):
            raise SafetyNeuronError(
                f"no projection is called {', '.join(sorted(unknown))}: use some of {' '.join(PROJECTIONS)}"
            )
        return NeuronSet({p: mask & (p in names) for p, mask in self.masks.items()})

    def by_layer(self) -> Iterator[tuple[str, int, torch.Tensor]]:
        """The set as (projection, layer from 0, channels), wherever a layer has any."""
        for projection, mask in self.masks.items():
            for layer in mask.any(1).nonzero().flatten().tolist():
                yield projection, layer, mask[layer].nonzero().flatten()

    def cells(self) -> Iterator[tuple[str, int, int]]:
        """The set neuron by neuron: (projection, layer from 0, channel)."""
        for projection, layer, channels in self.by_layer():
            for channel in channels.tolist():
                yield projection, layer, channel

    def units(self) -> "Units":
        """The functional units that the set switches off, whole or in part.

        A unit is in it when any of its rows or columns is in the set: to zero one of gate row, up row and down column
        silences the channel as all three do. v rows and o columns are one unit a channel where every head has its own
        values (as many v rows as o columns), else each is one.
        """
        return Units(
            {
                kind: torch.stack([self.masks[p] for p in projections]).any(0)
                for kind, projections in unit_kinds(self.shapes).items()
            }
        )

    def share_in(self, projections: Iterable[str], units: bool = False) -> float:
        """Share of the set in some projections, 0 to 1: of its neurons, or of its functional units; NaN for the empty set.

        A unit counts where the set has a row or column of it in these projections.
        """
        inside, whole = self.only(projections), self
        if units:
            inside, whole = inside.units(), whole.units()
        return len(inside) / len(whole) if len(whole) else float("nan")

    def parameter_share(self, model: PreTrainedModel) -> float:
        """Share of all parameters of `model` that the set's rows and columns hold, 0 to 1."""
        sizes = Architecture(model).parameters_per_neuron()
        inside = sum(count * sizes[p] for p, count in self.counts().items())
        return inside / sum(parameter.numel() for parameter in model.parameters())

    def digest(self) -> str:
        """Hash of the set, for cache keys."""
        return digest({p: mask.nonzero().tolist() for p, mask in self.masks.items()}, self.shapes)

    def save(self, path: str | Path) -> None:
        """Write the masks to a safetensors file."""
        masks = {p: mask.to(torch.uint8) for p, mask in self.masks.items()}
        write_tensors(path, "neuron file", masks, {})

    @classmethod
    def load(cls, path: str | Path) -> "NeuronSet":
        """Read a file written by `save`."""
        cure = "write it again with NeuronSet.save"
        with read_tensors(path, "neuron file", cure) as (masks, _):
            return cls({name: mask.bool() for name, mask in masks.items()})


@dataclass(frozen=True)
class Units:
    """Functional units of a model: what cannot be switched off in part. ``len`` counts them.

    Attributes
    ----------
    kinds : dict of str to torch.Tensor
        Boolean (layers, channels) per kind: `q`, `k`, `ffn` (gate row, up row and down column of a channel), and `vo`
        (v row and o column of a channel) where every head has its own values, else `v` and `o`.
    """

    kinds: dict[str, torch.Tensor]

    def __len__(self):
        return sum(self.counts().values())

    def __repr__(self):
        return f"Units({len(self)} of {self.total} functional units, {self.share:.2%})"

    @property
    def total(self) -> int:
        """Units of the model, in here or not."""
        return sum(mask.numel() for mask in self.kinds.values())

    @property
    def share(self) -> float:
        """Share of the model's units that are in here, 0 to 1."""
        return len(self) / self.total

    def counts(self) -> dict[str, int]:
        """Units per kind."""
        return {kind: int(mask.sum()) for kind, mask in self.kinds.items()}

    @property
    def leave_room(self) -> bool:
        """Whether every layer has as many units of each kind outside as in here, so that a random set can be drawn there."""
        return all(bool((mask.sum(1) <= (~mask).sum(1)).all()) for mask in self.kinds.values())

    def neurons(self) -> NeuronSet:
        """All rows and columns of these units."""
        return NeuronSet({p: mask for kind, mask in self.kinds.items() for p in UNIT_KINDS[kind]})
