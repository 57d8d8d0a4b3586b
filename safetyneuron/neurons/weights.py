"""The weights of a model as one: their fingerprint, and a block in which none of them learns."""

import hashlib
from contextlib import contextmanager

import torch

from safetyneuron.neurons.architecture import stored

_INTEGER = {
    1: torch.int8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
}  # bytes of a number -> type of its bits


def fingerprint(model):
    """Hash of a model's shapes and of the sum of the bits of every row: one changed weight changes it."""
    hasher = hashlib.sha256(
        repr([(n, tuple(p.shape), str(p.dtype)) for n, p in model.named_parameters()]).encode()
    )
    for name, parameter in model.named_parameters():
        module, _, own = name.rpartition(".")
        parameter = stored(model.get_submodule(module), own, name)
        bits = parameter.detach().view(_INTEGER[parameter.element_size()])
        hasher.update(
            bits.sum(-1, dtype=torch.int64).cpu().numpy().tobytes()
        )  # whole numbers: no order of summing matters
    return hasher.hexdigest()[:20]


@contextmanager
def frozen(model):
    """No weight of the model asks for a gradient for the length of a `with` block; afterwards those do that did before."""
    parameters = list(model.parameters())
    wanted = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield model
    finally:
        for parameter, flag in zip(parameters, wanted):
            parameter.requires_grad_(flag)
