"""Importance of q and k to first order in the change of the logits: matrix products over all channels at once.

Zeroing channel j changes the logits by −D_j and the attention probabilities, to first order, by
dP = −P ∘ (D_j − rowsum(P ∘ D_j)). The norm of dP · V W_O is taken as if the keys' contributions to one query were
orthogonal, Σ_s dP(t, s)² c(t, s) with c(t, s) = ‖V_s W_O − o_t‖² (o_t the head's output), and so are the heads of a
group. Both cost accuracy and save a factor d: the squares over s of a sum of products are products of sums.
"""

import torch

from safetyneuron.importance.exact import (
    CHUNK_BYTES,
    Attention,
    OutputFactors,
    capped,
    key_removal,
    logits_of,
    masked,
    query_removal,
)


def first_order(attention: Attention, factors: OutputFactors) -> tuple[torch.Tensor, torch.Tensor]:
    """First-order importance of every channel of q and of k, in the unit of `importance.exact`.

    Parameters
    ----------
    attention : importance.Attention
    factors : importance.OutputFactors

    Returns
    -------
    (torch.Tensor, torch.Tensor)
        q (B, H·d) and k (B, G·d).
    """
    parts = [_by_groups(part, factors) for part in attention.by_prompts()]
    return tuple(torch.cat(scores) for scores in zip(*parts))


def _by_groups(attention, factors):
    """The same for as many groups at a time as fit in memory."""
    batch, _, n, _ = attention.query.shape
    one_group = attention.repeat * batch * n * n * attention.query.element_size()
    step = max(1, 2 * CHUNK_BYTES // one_group)
    chunks = [slice(g, min(g + step, attention.groups)) for g in range(0, attention.groups, step)]
    heads = [slice(c.start * attention.repeat, c.stop * attention.repeat) for c in chunks]
    scores = [_first_order(attention.part(c), factors.single[h]) for c, h in zip(chunks, heads)]
    return tuple(torch.cat(of_chunks, 1) for of_chunks in zip(*scores))


def _first_order(attention, factors):
    """The same for all heads at once: their maps must fit in memory several times."""
    logits = logits_of(attention)
    probabilities = torch.softmax(masked(capped(logits, attention.softcap), attention.allowed), -1)
    values = attention.value.repeat_interleave(attention.repeat, 1) @ factors
    weights = (
        probabilities.square() * _spread(values, probabilities) * attention.real[:, None, :, None]
    )
    slope = (
        None if attention.softcap is None else 1 - torch.tanh(logits / attention.softcap).square()
    )
    q, k = (
        _squares(_terms(r, logits, slope), probabilities, weights)
        for r in (query_removal(attention), key_removal(attention))
    )
    return q.flatten(1).sqrt(), k.unflatten(1, (attention.groups, attention.repeat)).sum(2).flatten(
        1
    ).sqrt()


def _squares(terms, probabilities, weights):
    """Σ over queries t and keys s of dP_j(t, s)² c(t, s), for every head and channel: (B, H, d)."""
    mean = sum(left * (_times(probabilities, x) @ right) for left, x, right in terms)
    cross = sum(left * (_times(weights, x) @ right) for left, x, right in terms)
    total = mean.square() * weights.sum(-1, keepdim=True) - 2 * mean * cross
    for i, (left, x, right) in enumerate(terms):
        total += left.square() * (_times(weights, x, x) @ right.square())
        for left_2, x_2, right_2 in terms[i + 1 :]:
            total += 2 * left * left_2 * (_times(weights, x, x_2) @ (right * right_2))
    return total.sum(2).clamp_min(0)


def _times(weights, *factors):
    """Product with the factors that are not None, which stands for one."""
    for factor in factors:
        weights = weights if factor is None else weights * factor
    return weights


def _spread(values, probabilities):
    """c(t, s): squared distance of each key's contribution from the head's output, (B, H, n, n)."""
    out = probabilities @ values
    distance = (
        values.square().sum(-1)[..., None, :]
        - 2 * out @ values.transpose(-1, -2)
        + out.square().sum(-1, keepdim=True)
    )
    return distance.clamp_min(0)


def _terms(removal, logits, slope):
    """D_j(t, s) times the cap's slope as a sum of left_j(t) · x(t, s) · right_j(s), x None for one.

    left and right (B, H, n, d), x (B, H, n, n).
    """
    terms = [(left, slope, right) for left, right in zip(removal.left, removal.right)]
    ratio = removal.ratio
    if ratio is None:
        return terms
    ones, grown = torch.ones_like(ratio), _times(logits, slope)
    if removal.of_query:
        return [(left * ratio, x, right) for left, x, right in terms] + [(1 - ratio, grown, ones)]
    return [(left, x, right * ratio) for left, x, right in terms] + [(ones, grown, 1 - ratio)]
