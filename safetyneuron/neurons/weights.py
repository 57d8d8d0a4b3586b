"""The weights of a model as one: their fingerprint, and a block in which none of them learns."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import nn

from safetyneuron.neurons.architecture import stored

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # bytes of a number -> type of its bits
BLOCK = 2**18  # numbers at a time: what is computed of them stays in the processor's cache


def fingerprint(model: nn.Module) -> str:
    """Hash of a model's shapes and weights: one changed weight changes it, and so does one at another place."""
    hasher = hashlib.sha256(
        repr([(n, tuple(p.shape), str(p.dtype)) for n, p in model.named_parameters()]).encode()
    )
    for name, parameter in model.named_parameters():
        module, _, own = name.rpartition(".")
        parameter = stored(model.get_submodule(module), own, name)
        hasher.update(row_sums(parameter).cpu().numpy().tobytes())
    return hasher.hexdigest()[:20]


def row_sums(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of the bits of every row, each times the factor of its place: whole numbers, so no order of summing matters."""
    bits = _bits(tensor.detach())
    factors = _factors(bits.shape[-1], bits.device)
    blocks = bits.split(max(1, BLOCK // max(1, bits.shape[-1])))
    return torch.cat([(block * factors).sum(-1) for block in blocks])


def _bits(tensor):
    """The bits of a tensor as rows of whole numbers of at most 32 bits, whose products with odd factors of 64 bits all differ."""
    tensor = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1).contiguous()
    whole = tensor.element_size() * tensor.shape[-1] % 4 == 0
    return tensor.view(torch.int32 if whole else WORDS[tensor.element_size()])


@lru_cache(16)
def _factors(count, device):
    """An odd factor for every place in a row, without a pattern (multiplied and mixed as in Knuth's hashing)."""
    places = torch.arange(1, count + 1, device=device) * 0x1E3779B97F4A7C15
    return (places ^ (places >> 31)) * 0x3F58476D1CE4E5B9 | 1


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
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
