"""Switch neurons off, or give them another model's parameters, for the length of a `with` block."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from safetyneuron.errors import SafetyNeuronError
from safetyneuron.neurons.architecture import Architecture
from safetyneuron.neurons.sets import NeuronSet


@contextmanager
def deactivate(model: PreTrainedModel, neurons: NeuronSet) -> Iterator[PreTrainedModel]:
    """Set the parameters of `neurons` to zero; every weight is back, bit for bit, on exit and after an error.

    A bias on q, k, v, gate or up belongs to its channel and is zeroed with it, so the channel is silent.

    >>> with deactivate(model, neurons):
    ...     attack_success_rate(model, tokenizer, prompts)

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Changed in place while the block runs.
    neurons : NeuronSet
        The neurons to switch off (Zhao et al. 2025, §2.2).

    Raises
    ------
    SafetyNeuronError
        If the set belongs to a model of another shape.
    """
    with _replaced(model, neurons, lambda layer, projection: None):
        yield model


@contextmanager
def transplant(
    model: PreTrainedModel, donor: PreTrainedModel, neurons: NeuronSet
) -> Iterator[PreTrainedModel]:
    """Give `neurons` the parameters that they have in another model of the same shape, for the length of a `with` block.

    Raises
    ------
    SafetyNeuronError
        If the set belongs to a model of another shape, or the donor has another shape.
    """
    other = Architecture(donor)
    check_shapes(other, neurons)
    with _replaced(model, neurons, other.place):
        yield model


@contextmanager
def _replaced(model, neurons, source):
    """Parameters of the neurons from the `Place` that `source(layer, projection)` gives, or zero for None."""
    architecture = Architecture(model)
    check_shapes(architecture, neurons)
    saved = []
    try:
        with torch.no_grad():
            for projection, layer, channels in neurons.by_layer():
                place = architecture.place(layer, projection)
                _write(place, source(layer, projection), channels, saved)
        yield model
    finally:
        with torch.no_grad():
            for tensor, channels, original in reversed(saved):
                tensor[channels] = original


def _write(place, source, channels, saved):
    channels = channels.to(place.weight.device)
    for tensor, new in (
        (place.weight, source and source.weight),
        (place.bias, source and source.bias),
    ):
        if tensor is not None:
            saved.append((tensor, channels, tensor[channels].clone()))
            tensor[channels] = 0 if new is None else new[channels.to(new.device)].to(tensor)


def check_shapes(architecture: Architecture, neurons: NeuronSet) -> None:
    """Refuse a neuron set that does not fit the model."""
    expected = {p: (len(architecture.layers), width) for p, width in architecture.widths.items()}
    for projection, shape in neurons.shapes.items():
        if shape != expected[projection]:
            raise SafetyNeuronError(
                f"the neuron set has {shape} channels for {projection} but the model has {expected[projection]}:"
                " measure importance on this model"
            )
