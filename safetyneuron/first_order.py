"""Importance of q and k to first order in the change of the logits: matrix products over all channels at once.

Zeroing channel j changes the logits by −D_j and the attention probabilities, to first order, by
dP = −P ∘ (D_j − rowsum(P ∘ D_j)). The norm of dP · V W_O is taken as if the keys' contributions to one query were
orthogonal, Σ_s dP(t, s)² c(t, s) with c(t, s) = ‖V_s W_O − o_t‖² (o_t the head's output), and so are the heads of a
group. Both cost accuracy and save a factor d: the squares over s of a sum of products are products of sums.
"""

import torch

from safetyneuron.importance import Attention, capped, key_removal, logits_of, masked, query_removal


def first_order_query(attention: Attention, w_o_factors):
    """First-order importance of channel j of q, in the unit of `exact_query`: (B, H·d)."""
    squares = []
    for g in range(attention.groups):
        for h in range(g * attention.repeat, (g + 1) * attention.repeat):
            squares.append(_squares(attention, w_o_factors, g, [h], query_removal(attention, h)))
    return torch.cat(squares, 1).sqrt()


def first_order_key(attention: Attention, w_o_factors):
    """First-order importance of channel j of k, in the unit of `exact_key`: (B, G·d)."""
    squares = []
    for g in range(attention.groups):
        heads = list(range(g * attention.repeat, (g + 1) * attention.repeat))
        squares.append(_squares(attention, w_o_factors, g, heads, key_removal(attention, heads)))
    return torch.cat(squares, 1).sqrt()


def _squares(attention, w_o_factors, group, heads, removal):
    """Σ over heads, queries t and keys s of dP_j(t, s)² c(t, s), for every channel j: (B, d)."""
    logits = logits_of(attention, heads)
    probabilities = torch.softmax(masked(capped(logits, attention.softcap), attention.allowed), -1)
    weights = probabilities.square() * _spread(attention, w_o_factors, group, heads, probabilities)
    weights = weights * attention.real[:, None, :, None]
    terms = _terms(attention, removal, logits)
    mean = sum(left * ((probabilities * x) @ right) for left, x, right in terms)
    cross = sum(left * ((weights * x) @ right) for left, x, right in terms)
    second = 0
    for i, (left, x, right) in enumerate(terms):
        for left_2, x_2, right_2 in terms[i:]:
            product = left * left_2 * ((weights * x * x_2) @ (right * right_2))
            second = second + (product if left_2 is left else 2 * product)
    total = second - 2 * mean * cross + mean.square() * weights.sum(-1, keepdim=True)
    return total.sum((1, 2)).clamp_min(0)


def _spread(attention, w_o_factors, group, heads, probabilities):
    """c(t, s): squared distance of each key's contribution from the head's output, (B, |h|, n, n)."""
    first = group * attention.repeat
    values = attention.value[:, group, None] @ w_o_factors[group][[h - first for h in heads]]
    out = probabilities @ values
    distance = values.square().sum(-1)[..., None, :] - 2 * out @ values.transpose(-1, -2) + out.square().sum(-1, keepdim=True)
    return distance.clamp_min(0)


def _terms(attention, removal, logits):
    """D_j(t, s) times the cap's slope as a sum of left_j(t) · x(t, s) · right_j(s).

    left (B, |h|, n, d), x (B, |h|, n, n) or 1, right (B, |h|, n, d).
    """
    slope = 1.0 if attention.softcap is None else 1 - torch.tanh(logits / attention.softcap).square()
    lefts = [removal.left[..., i].transpose(2, 3) for i in (0, 1)]
    rights = [removal.right[..., i, :].transpose(2, 3) for i in (0, 1)]
    if removal.ratio is None:
        return [(left, slope, right) for left, right in zip(lefts, rights)]
    of_query = removal.ratio.shape[-1] == 1
    ratio = (removal.ratio[..., 0] if of_query else removal.ratio[..., 0, :]).transpose(2, 3)
    ones = torch.ones_like(ratio)
    scaled = [(left * ratio, slope, right) if of_query else (left, slope, right * ratio) for left, right in zip(lefts, rights)]
    return scaled + [(1 - ratio if of_query else ones, slope * logits, ones if of_query else 1 - ratio)]
