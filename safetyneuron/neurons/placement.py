"""Where models lie: on the GPU while they are used, in main memory otherwise; without a GPU nothing moves."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def is_split(model: nn.Module) -> bool:
    """Whether a model's layers lie on several devices."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


@contextmanager
def _moved(models, there, back):
    """Models lie on one device for the length of a `with` block, and on another afterwards."""
    try:
        for model in models:
            model.to(there)
        yield
    finally:
        for model in models:
            model.to(back)


@contextmanager
def awake(*models: nn.Module) -> Iterator[None]:
    """Models are on the GPU for the length of a `with` block, and in main memory afterwards."""
    whole = [m for m in models if torch.cuda.is_available() and not is_split(m)]
    try:
        with _moved(whole, "cuda", "cpu"):
            yield
    finally:
        if whole:
            torch.cuda.empty_cache()


@contextmanager
def aside(*models: nn.Module) -> Iterator[None]:
    """Models that lie on the GPU are in main memory for the length of a `with` block."""
    there = [m for m in models if next(m.parameters()).is_cuda and not is_split(m)]
    with _moved(there, "cpu", "cuda"):
        yield


@contextmanager
def alone(model: nn.Module, *others: nn.Module) -> Iterator[None]:
    """A model is on the GPU, and others on it are in main memory, for the length of a `with` block."""
    with aside(*others), awake(model):
        yield
