"""Where the neurons of a Hugging Face model live: one table from projection names to module paths.

A neuron is one channel of a projection: an output channel (a row of the weight) of q, k, v, gate and up,
an input channel (a column) of o and down. Adding an architecture is adding a row to `FAMILIES`.
"""

from dataclasses import dataclass
from inspect import signature

import torch
from torch import nn
from transformers import PreTrainedModel

from safetyneuron.errors import SafetyNeuronError, UnsupportedArchitecture

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
ATTENTION = ("q", "k", "v", "o")
FEED_FORWARD = ("gate", "up", "down")
COLUMN_PROJECTIONS = ("o", "down")

_SEPARATE = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}

_FUSED = (
    _SEPARATE
    | dict.fromkeys("qkv", "self_attn.qkv_proj")
    | dict.fromkeys(("gate", "up"), "mlp.gate_up_proj")
)

# model_type of the configuration -> module path of each projection, inside a decoder layer. Projections that share a
# module share its rows, in the order of PROJECTIONS. Each row is checked against brute force in the tests.
FAMILIES = {
    "llama": _SEPARATE,
    "mistral": _SEPARATE,
    "qwen2": _SEPARATE,
    "qwen3": _SEPARATE,
    "gemma": _SEPARATE,
    "gemma2": _SEPARATE,
    "phi3": _FUSED,
}


def stored(module: nn.Module, name: str, label: str | None = None) -> torch.Tensor | None:
    """A module's tensor where its numbers live: accelerate keeps what it offloads to main memory outside the module.

    Raises
    ------
    SafetyNeuronError
        If the numbers are on disk, where a change would be lost.
    """
    tensor, weights = (
        getattr(module, name),
        getattr(getattr(module, "_hf_hook", None), "weights_map", None),
    )
    if tensor is None or not tensor.is_meta:
        return tensor
    first, second = (
        (weights[name], weights[name]) if weights is not None else (None, None)
    )  # both alive: addresses of the dead are reused
    if first is None or first.data_ptr() != second.data_ptr():
        raise SafetyNeuronError(
            f"weight {label or name} is offloaded to disk: load the model onto devices and main memory that hold all of it"
        )
    return first


@dataclass(frozen=True)
class Place:
    """One projection in one layer: `weight` holds its channels from `start` on, along `axis`."""

    module: nn.Linear
    axis: int
    start: int
    size: int

    @property
    def channels(self) -> slice:
        return slice(self.start, self.start + self.size)

    @property
    def weight(self) -> torch.Tensor:
        """The projection's part of the weight, channels first: (channels, other width)."""
        weight = stored(self.module, "weight")
        return weight[self.channels] if self.axis == 0 else weight[:, self.channels].T

    @property
    def bias(self) -> torch.Tensor | None:
        """The channels' biases; None for columns, whose bias belongs to no channel."""
        bias = stored(self.module, "bias")
        return None if bias is None or self.axis == 1 else bias[self.channels]


class Architecture:
    """The decoder layers of a model and the widths of their projections.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.

    Raises
    ------
    UnsupportedArchitecture
        Names the model type or the module that could not be placed.
    """

    def __init__(self, model):
        config = model.config.get_text_config()
        if config.model_type not in FAMILIES:
            raise UnsupportedArchitecture(
                f"model type {config.model_type!r} ({type(model).__name__}) is not supported:"
                f" use one of {', '.join(sorted(FAMILIES))}"
            )
        self.table = FAMILIES[config.model_type]
        self.layers = model.get_decoder().layers
        self.hidden = config.hidden_size
        self.heads = config.num_attention_heads
        self.groups = getattr(config, "num_key_value_heads", None) or self.heads
        self.head_width = getattr(config, "head_dim", None) or self.hidden // self.heads
        self.widths = dict(zip(PROJECTIONS, self._widths(config)))
        for layer in range(len(self.layers)):
            for projection in PROJECTIONS:
                self._check(layer, projection)

    def _widths(self, config):
        query, key = self.heads * self.head_width, self.groups * self.head_width
        return (query, key, key, query) + (config.intermediate_size,) * 3

    def _check(self, layer, projection):
        path = self.table[projection]
        try:
            module = self.layers[layer].get_submodule(path)
        except AttributeError:
            raise UnsupportedArchitecture(
                f"layer {layer} has no module {path}: this model is not laid out as its type says"
            ) from None
        axis, expected = self._axis(projection), self._expected_width(path, projection)
        weight = getattr(module, "weight", None)
        weight = (
            stored(module, "weight", f"layers.{layer}.{path}.weight")
            if torch.is_tensor(weight)
            else None
        )
        if not torch.is_tensor(weight) or weight.dim() != 2 or weight.shape[axis] != expected:
            shape = tuple(weight.shape) if torch.is_tensor(weight) else None
            raise UnsupportedArchitecture(
                f"layer {layer}, module {path}: expected {expected} channels on axis {axis}, found weight {shape}"
            )

    @staticmethod
    def _axis(projection):
        return 1 if projection in COLUMN_PROJECTIONS else 0

    def _expected_width(self, path, projection):
        """Width of a module: the sum over the projections that share it."""
        return sum(self.widths[p] for p in PROJECTIONS if self.table[p] == path)

    def place(self, layer: int, projection: str) -> Place:
        """The `Place` of one projection in one layer."""
        path = self.table[projection]
        before = PROJECTIONS[: PROJECTIONS.index(projection)]
        start = sum(self.widths[p] for p in before if self.table[p] == path)
        module = self.layers[layer].get_submodule(path)
        return Place(module, self._axis(projection), start, self.widths[projection])

    def module_names(self) -> list[str]:
        """Names of the modules that hold the projections, without their path."""
        return sorted({path.rsplit(".", 1)[1] for path in self.table.values()})

    def attention(self, layer: int) -> nn.Module:
        """The attention module of one layer."""
        return self.layers[layer].self_attn

    def feed_forward_norm(self, layer: int) -> nn.Module:
        """The norm that reads the residual stream between attention and the feed-forward block."""
        block = self.layers[layer]
        return getattr(block, "pre_feedforward_layernorm", None) or block.post_attention_layernorm

    def norm_after(self, layer: int, projection: str) -> nn.Module | None:
        """The norm that what `o` or `down` writes passes through before it joins the stream; None in most families."""
        block = self.layers[layer]
        if not hasattr(block, "pre_feedforward_layernorm"):
            return None
        return (
            block.post_attention_layernorm
            if projection == "o"
            else block.post_feedforward_layernorm
        )

    def parameters_per_neuron(self) -> dict[str, int]:
        """Weights that one neuron of each projection holds, from projection name to count."""
        return {p: self.place(0, p).weight.shape[1] for p in PROJECTIONS}


def cache_argument(model: PreTrainedModel) -> str:
    """What `model.forward` and its output call the keys and values read before: transformers 5.24 renamed `past_key_values`."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


@torch.no_grad()
def multiply_factors(model: PreTrainedModel, factors: torch.Tensor) -> PreTrainedModel:
    """Multiply (IA)³ factors (layers, channels) into the rows of the up projections, in place."""
    architecture = Architecture(model)
    for layer, factor in enumerate(factors):
        place = architecture.place(layer, "up")
        place.weight.mul_(factor[:, None].to(place.weight))
        if place.bias is not None:
            place.bias.mul_(factor.to(place.bias))
    return model
