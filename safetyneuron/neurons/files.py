"""Files of the core: tensors as safetensors, and in their header, as JSON, what they are."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from safetyneuron.cache import new_file
from safetyneuron.errors import SafetyNeuronError

VERSION = "1"
# What a file that was cut off, changed or made up can cause while it is read and put together.
DAMAGE = (OSError, SafetensorError, KeyError, TypeError, ValueError, IndexError, RuntimeError)


def write_tensors(path, kind: str, tensors: dict[str, torch.Tensor], facts: dict) -> None:
    """Write a file of a kind, whole or not at all. facts: whatever JSON can write."""
    header = {"kind": kind, "version": VERSION, "facts": json.dumps(facts)}
    with new_file(path) as temporary:
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, temporary, header)


@contextmanager
def read_tensors(path, kind: str, cure: str) -> Iterator[tuple[dict, dict]]:
    """Tensors by name and facts of a file written by `write_tensors`, for a `with` block that puts them together.

    Raises
    ------
    SafetyNeuronError
        If the file is of another kind or version, or cannot be read or put together; `cure` says what to do then.
    """
    try:
        with safe_open(path, "pt") as stored:
            header = stored.metadata() or {}
            found = header.get("kind"), header.get("version")
            if found != (kind, VERSION):
                raise SafetyNeuronError(
                    f"{path} is no {kind} of version {VERSION} (it says {found[0]}, {found[1]}): {cure}"
                )
            yield {n: stored.get_tensor(n) for n in stored.keys()}, json.loads(header["facts"])
    except DAMAGE as error:
        raise SafetyNeuronError(f"{path} is not a readable {kind} ({error}): {cure}") from None
