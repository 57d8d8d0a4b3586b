"""The definition of importance, executed literally: set one row or column to zero, run the block again, take the norm.

No closed form and no measuring hook is involved, so this is what the tests and the appendix hold the rules against.
It costs one run of a block per neuron: for small models only.
"""

from contextlib import ExitStack

import torch
from torch import nn
from transformers import PreTrainedModel

from safetyneuron.importance.attending import attending
from safetyneuron.neurons.architecture import FEED_FORWARD, PROJECTIONS, Architecture


def capture_inputs(
    model: PreTrainedModel, batch: dict[str, torch.Tensor]
) -> list[tuple[nn.Module, tuple, dict]]:
    """What each attention and feed-forward module receives: list of (module, args, kwargs), two a layer."""
    seen = []

    def keep(module, args, kwargs):
        seen.append((module, args, kwargs))

    with ExitStack() as handles:
        for layer in Architecture(model).layers:
            for module in (layer.self_attn, layer.mlp):
                handle = module.register_forward_pre_hook(keep, with_kwargs=True)
                handles.callback(handle.remove)
        with torch.no_grad():
            model(**batch, use_cache=False)
    return seen


def plain_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as defined, in the model's own precision (eager attention rounds its softmax to float32)."""
    repeat = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(repeat, 1).transpose(2, 3) * scaling
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    weights = torch.softmax(logits + attention_mask, -1)
    return (weights @ value.repeat_interleave(repeat, 1)).transpose(1, 2).contiguous(), weights


def brute_force(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Importance of every neuron for every prompt of a batch, by zeroing one at a time (Zhao et al. 2025, Eq 1).

    batch: `input_ids` and `attention_mask`, (B, n). Returns projection name to (B, layers, channels).
    """
    with attending(model, plain_attention):
        architecture, seen = Architecture(model), capture_inputs(model, batch)
        layers, real = range(len(architecture.layers)), batch["attention_mask"].bool()
        places = {
            p: [
                (architecture.place(layer, p), seen[2 * layer + (p in FEED_FORWARD)])
                for layer in layers
            ]
            for p in PROJECTIONS
        }
        return {
            p: torch.stack([_each_channel(place, *call, real) for place, call in pairs], 1)
            for p, pairs in places.items()
        }


@torch.no_grad()
def _each_channel(place, module, args, kwargs, real):
    def run():
        out = module(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    before, norms = run(), []
    for channel in range(place.size):
        kept = [(t, t[channel].clone()) for t in (place.weight, place.bias) if t is not None]
        try:
            for tensor, _ in kept:
                tensor[channel] = 0
            change = (run() - before) * real[..., None]
        finally:
            for tensor, original in kept:
                tensor[channel] = original
        norms.append(change.flatten(1).norm(dim=1))
    return torch.stack(norms, 1)
