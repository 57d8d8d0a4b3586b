"""Two other readings of importance: the paper's formulas as printed, and what its released code computes.

Both measure q and k on attention probabilities and not on the sub-block's output, so their numbers have other units
than those of the feed-forward block, and one threshold cannot serve both.
"""

import torch

from safetyneuron.importance.exact import CHUNK_BYTES, Attention, masked, unrotate


def paper(attention: Attention) -> dict[str, torch.Tensor]:
    """The paper's scores (B, channels) of q, k and v; one pass over the attention maps serves q and k."""
    q = paper_query(attention)
    return {"q": q, "k": over_groups(attention, q), "v": paper_value(attention)}


def released(attention: Attention) -> dict[str, torch.Tensor]:
    """The released code's scores of q, k and v; that of k is that of q, whose index the tuner divides by four to find the row."""
    q, width = released_query(attention), attention.groups * attention.key.shape[-1]
    return {"q": q, "k": divided_by_four(q, width), "v": released_value(attention)}


def paper_query(attention: Attention) -> torch.Tensor:
    """Eq 12 and 14 as printed: ‖softmax((QKᵀ − Δ_j)/√d) − softmax(QKᵀ/√d)‖, Δ_j = Q[:, j] K[:, j]ᵀ; (B, H·d).

    The formulas have no rotary embedding, so Q and K are taken before it; the causal mask is kept.
    """
    return probability_change(attention, *unrotated(attention), attention.scaling).flatten(1).sqrt()


def paper_key(attention: Attention) -> torch.Tensor:
    """Eq 12 for K: "symmetrical", so the change that q's channel makes, over the heads of the group; (B, G·d)."""
    return over_groups(attention, paper_query(attention))


def over_groups(attention: Attention, scores: torch.Tensor) -> torch.Tensor:
    """Norm over the heads of every group: (B, H·d) to (B, G·d)."""
    return scores.unflatten(1, (attention.groups, attention.repeat, -1)).norm(dim=2).flatten(1)


def paper_value(attention: Attention) -> torch.Tensor:
    """Eq 9 applied to W_V of Eq 10, which has no W_O: ‖(P V)[:, j]‖ over the heads of the group; (B, G·d)."""
    return (
        head_norms(attention)
        .unflatten(1, (attention.groups, attention.repeat))
        .norm(dim=2)
        .flatten(1)
    )


def head_norms(attention: Attention) -> torch.Tensor:
    """Norm over real positions of every channel of every head's output: (B, H, d)."""
    return (attention.heads * attention.real[:, None, :, None]).norm(dim=2)


def unrotated(attention: Attention) -> list[torch.Tensor]:
    """Queries and keys before rotary embedding."""
    return [unrotate(x, attention.cos, attention.sin) for x in (attention.query, attention.key)]


def released_query(attention: Attention) -> torch.Tensor:
    """The released code's score of q: the *unscaled* product is taken from the *scaled* logits, after rotation, and the
    squares are summed without a root; (B, H·d)."""
    return probability_change(attention, attention.query, attention.key, 1.0).flatten(1)


def released_value(attention: Attention) -> torch.Tensor:
    """The released code's score of v: Σ over positions of |head output|, its index divided by four; (B, G·d)."""
    sizes = (attention.heads.abs() * attention.real[:, None, :, None]).sum(2).flatten(1)
    return divided_by_four(sizes, attention.groups * attention.value.shape[-1])


def released_feed_forward(up: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The released code's score of up and down: Σ over positions of |W_up x|; up (B, n, F), returns (B, F)."""
    return (up.abs() * real[..., None]).sum(1)


def divided_by_four(scores: torch.Tensor, width: int) -> torch.Tensor:
    """Score of row i as the largest among the indices 4i … 4i + 3; rows never reached get zero."""
    rows = torch.arange(scores.shape[1], device=scores.device) // 4
    reached = rows < width
    index = rows[reached].expand(scores.shape[0], -1)
    return scores.new_zeros(scores.shape[0], width).scatter_reduce(
        1, index, scores[:, reached], "amax"
    )


def probability_change(
    attention: Attention, query: torch.Tensor, key: torch.Tensor, factor: float
) -> torch.Tensor:
    """Σ over positions of the squared change of the probabilities when factor · q_j k_j is taken away: (B, H, d)."""
    heads = []
    for h in range(query.shape[1]):
        q, k = query[:, h], key[:, h // attention.repeat]
        logits = masked(q @ k.transpose(1, 2) * attention.scaling, attention.allowed[:, 0])
        before, step = (
            torch.softmax(logits, -1),
            max(1, CHUNK_BYTES // (logits.numel() * logits.element_size())),
        )
        heads.append(
            torch.cat(
                [
                    _change(logits, before, a, b, attention.real)
                    for a, b in zip((q * factor).split(step, -1), k.split(step, -1))
                ],
                1,
            )
        )
    return torch.stack(heads, 1)


def _change(logits, before, q, k, real):
    removed = q.transpose(1, 2)[..., None] * k.transpose(1, 2)[..., None, :]
    change = torch.softmax(logits[:, None] - removed, -1) - before[:, None]
    return (change.square().sum(-1) * real[:, None]).sum(-1)
