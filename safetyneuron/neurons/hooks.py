"""Read or overwrite what passes through a model, for the length of a `with` block.

>>> with reading(model, [("down", 3), ("between", 3)]) as seen:
...     model(ids)
>>> seen["down", 3].shape  # (B, n, channels)

A place is (what, layer from 0). What a projection's name says is the activation of its neurons: what rows put out and
columns read. ``into q`` and the like are what a projection reads; ``before``, ``between`` and ``after`` are the residual
stream before a layer, between its attention and its feed-forward block, and after it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from transformers import PreTrainedModel

from safetyneuron.neurons.architecture import COLUMN_PROJECTIONS, PROJECTIONS, Architecture


@contextmanager
def reading(
    model: PreTrainedModel, places: Iterable[tuple[str, int]], keep: Callable | None = None
) -> Iterator[dict]:
    """What passes through some places: a dict, place to (B, n, width), of the last forward pass; the hooks are gone on exit.

    keep: what to keep of the values, for example a sum; everything by default.
    """
    seen = {}

    def look(place, values):
        seen[place] = values if keep is None else keep(values)

    with overwriting(model, {place: partial(look, place) for place in places}):
        yield seen


@contextmanager
def overwriting(model: PreTrainedModel, changes: dict[tuple[str, int], Callable]) -> Iterator[None]:
    """Put `change(values)` into some places, place to function; None leaves what is there. The hooks are gone on exit.

    Blocks can be nested: the inner one sees what the outer one leaves. What is put `between` is read by the feed-forward
    block alone; the stream goes past it as it was.
    """
    architecture = Architecture(model)
    with ExitStack() as hooks:
        for place, change in changes.items():
            hooks.callback(_hook(*_find(architecture, *place), change).remove)
        yield


def _find(architecture, what, layer):
    """Module, whether the place is what it reads, and its channels where other projections share the module."""
    block = architecture.layers[layer]
    if what in PROJECTIONS:
        place = architecture.place(layer, what)
        is_column = what in COLUMN_PROJECTIONS
        return place.module, is_column, None if is_column else place.channels
    if what.startswith("into "):
        return architecture.place(layer, what.removeprefix("into ")).module, True, None
    if what == "between":
        return architecture.feed_forward_norm(layer), True, None
    return block, {"before": True, "after": False}[what], None


def _hook(module, reads, channels, change):
    def change_part(values):
        if channels is None:
            return change(values)
        part = change(values[..., channels])
        left, right = values[..., : channels.start], values[..., channels.stop :]
        return None if part is None else torch.cat([left, part, right], -1)

    def on_input(_, inputs, named):
        new = change_part(inputs[0] if inputs else named["hidden_states"])
        if new is None:
            return None
        return ((new, *inputs[1:]), named) if inputs else ((), named | {"hidden_states": new})

    def on_output(_, inputs, output):
        whole = output if isinstance(output, tuple) else (output,)  # of some releases a layer's
        new = change_part(whole[0])
        if new is None:
            return None
        return (new, *whole[1:]) if isinstance(output, tuple) else new

    if reads:
        return module.register_forward_pre_hook(on_input, with_kwargs=True)
    return module.register_forward_hook(on_output)
