"""Brute force: set one row or column to zero, run the block again, take the norm. No hooks, no closed forms."""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from safetyneuron.architecture import PROJECTIONS, Architecture


def capture_inputs(model, batch):
    """What each attention and feed-forward module receives: lists of (args, kwargs)."""
    seen, handles = [], []
    for layer in Architecture(model).layers:
        for module in (layer.self_attn, layer.mlp):
            keep = lambda m, args, kwargs: seen.append((m, args, kwargs))
            handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    with torch.no_grad():
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def plain_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, softcap=None, **_):
    """Attention as defined, in the model's own precision (eager attention rounds its softmax to float32)."""
    repeat = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(repeat, 1).transpose(2, 3) * scaling
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    weights = torch.softmax(logits + attention_mask, -1)
    return (weights @ value.repeat_interleave(repeat, 1)).transpose(1, 2).contiguous(), weights


def brute_force(model, batch):
    """Importance of every neuron, projection name to (B, layers, channels)."""
    AttentionInterface.register("oracle", plain_attention)
    AttentionMaskInterface.register("oracle", eager_mask)
    model.set_attn_implementation("oracle")
    architecture, seen = Architecture(model), capture_inputs(model, batch)
    real = batch["attention_mask"].bool()
    result = {}
    for projection in PROJECTIONS:
        rows = []
        for layer in range(len(architecture.layers)):
            module, args, kwargs = seen[2 * layer + (projection in ("gate", "up", "down"))]
            rows.append(_each_channel(architecture.place(layer, projection), module, args, kwargs, real))
        result[projection] = torch.stack(rows, 1)
    return result


@torch.no_grad()
def _each_channel(place, module, args, kwargs, real):
    def run():
        out = module(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    before, norms = run(), []
    for channel in range(place.size):
        kept = [(t, t[channel].clone()) for t in (place.weight, place.bias) if t is not None]
        for tensor, _ in kept:
            tensor[channel] = 0
        change = (run() - before) * real[..., None]
        norms.append(change.flatten(1).norm(dim=1))
        for tensor, original in kept:
            tensor[channel] = original
    return torch.stack(norms, 1)
