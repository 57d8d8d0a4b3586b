"""AtP*: attribution patching with the softmax of attention computed anew for every row of q and k (after Kramár et al. 2024)."""

import torch

from safetyneuron.detectors.gradients import odds_and_gradients, probing, summed
from safetyneuron.importance.exact import (
    capped,
    key_removal,
    logits_of,
    masked,
    query_removal,
)
from safetyneuron.importance.recorder import Recorder, recording


class Attentions(Recorder):
    """Keeps what attention layers did (`exact.Attention`), in `layers`, and measures nothing."""

    layers = None

    def before_down(self, layer, module, inputs):
        """Nothing: feed-forward neurons have no softmax."""

    def _attention_scores(self, layer, attention):
        self.layers[layer] = attention
        return {}


@torch.no_grad()
def recomputed(attention, gradient):
    """What zeroing each row of q and k takes from the scalar, first order in the probabilities but not in the logits.

    Σ_ts (P − softmax(S_j))(t, s) ∂L/∂P(t, s), where ∂L/∂P(t, s) = ⟨∂L/∂z(t), v(s)⟩.

    Parameters
    ----------
    attention : importance.exact.Attention
    gradient : torch.Tensor
        ∂L/∂z (B, n, H·d), z the heads side by side.

    Returns
    -------
    (torch.Tensor, torch.Tensor)
        q (B, H·d) and k (B, G·d).
    """
    by_head = gradient.unflatten(2, (attention.query.shape[1], -1)).transpose(1, 2)
    values = attention.value.repeat_interleave(attention.repeat, 1)
    slope = by_head.to(values) @ values.transpose(-1, -2)
    logits = logits_of(attention)

    def probabilities(x):
        return torch.softmax(masked(capped(x, attention.softcap), attention.allowed), -1)

    def lost(removal):
        channels = range(removal.left[0].shape[-1])
        kept = (probabilities(_without(removal, logits, j)) for j in channels)
        before = (probabilities(logits) * slope).sum((-2, -1))
        return torch.stack([before - (p * slope).sum((-2, -1)) for p in kept], -1)  # (B, H, d)

    q, k = lost(query_removal(attention)), lost(key_removal(attention))
    return q.flatten(1), k.unflatten(1, (attention.groups, -1)).sum(2).flatten(1)


def _without(removal, logits, channel):
    """Logits with one channel of every head at zero."""
    pairs = zip(removal.left, removal.right)
    changed = logits - sum(l[..., channel, None] * r[..., None, :, channel] for l, r in pairs)
    if removal.ratio is None:
        return changed
    ratio = removal.ratio[..., channel]
    return changed * (ratio[..., None] if removal.of_query else ratio[..., None, :])


def star(case):
    """AtP*: gradient × activation, with q and k through their softmax; without the paper's dropping of gradients (GradDrop)."""
    model, tokenizer = case.model, case.tokenizer

    def run(some):
        recorder.layers = {}
        with probing(model) as probe:
            _, gradients = odds_and_gradients(model, tokenizer, some, probe)
        totals = {
            key: (g.float() * probe.shifts[key].float()).sum(1) for key, g in gradients.items()
        }
        for layer, attention in recorder.layers.items():
            found = recomputed(attention, gradients["o", layer])
            totals |= {(p, layer): x for p, x in zip("qk", found)}
        return {key: (x[: len(some)] + x[len(some) :]).cpu() for key, x in totals.items()}

    with recording(model, kind=Attentions) as recorder:
        started = model.get_decoder().register_forward_pre_hook(
            lambda module, args, named: recorder.start(named["attention_mask"]), with_kwargs=True
        )
        try:
            return summed(case.pairs("harmful"), run, batch_size=4).mean
        finally:
            started.remove()
