"""What a training changes besides weights, put back: a process and a model are left as they were found."""

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def own_randomness() -> Iterator[None]:
    """What is drawn or seeded inside leaves the random numbers of Python, NumPy and torch outside as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def quick_collection(model: torch.nn.Module) -> Iterator[None]:
    """For a model in main memory, nothing that is alive now is looked through when a trainer collects garbage, which it does before every training.

    On a GPU that is what frees memory, and is left alone.
    """
    small = next(model.parameters()).device.type == "cpu"
    if small:
        gc.freeze()
    try:
        yield
    finally:
        if small:
            gc.unfreeze()


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Random numbers, threads, gradient flags, train or eval mode and the use of a cache are as before on exit.

    Trainers set them all. Weights are not looked at.
    """
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    threads, reads_cache = torch.get_num_threads(), model.config.use_cache
    try:
        with own_randomness():
            yield
    finally:
        torch.set_num_threads(threads)
        model.config.use_cache = reads_cache
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
