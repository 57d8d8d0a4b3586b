"""Where models lie: on the GPU while they are used, in main memory otherwise; without a GPU nothing moves."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def is_split(model: nn.Module) -> bool:
    """Whether a model's layers lie on several devices."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


@contextmanager
def awake(*models: nn.Module) -> Iterator[None]:
    """Models are on the GPU for the length of a `with` block, and in main memory afterwards."""
    moved = [m for m in models if torch.cuda.is_available() and not is_split(m)]
    try:
        for model in moved:
            model.to("cuda")
        yield
    finally:
        for model in moved:
            model.to("cpu")
        if moved:
            torch.cuda.empty_cache()


@contextmanager
def aside(*models: nn.Module) -> Iterator[None]:
    """Models that lie on the GPU are in main memory for the length of a `with` block."""
    there = [m for m in models if next(m.parameters()).is_cuda and not is_split(m)]
    try:
        for model in there:
            model.to("cpu")
        yield
    finally:
        for model in there:
            model.to("cuda")


@contextmanager
def alone(model: nn.Module, *others: nn.Module) -> Iterator[None]:
    """A model is on the GPU, and others on it are in main memory, for the length of a `with` block."""
    with aside(*others), awake(model):
        yield
