"""Neuron importance: the closed forms, as pure functions of what one forward pass computed.

The importance of a neuron for one prompt is the Frobenius norm, over the prompt's real positions, of the
change in its sub-block's output (attention or feed-forward, before any post-norm) when the neuron's
parameters, its bias with them, are set to zero (Zhao et al. 2025, Eq 1). `exact` and `first_order.py` share that
unit, a norm in the residual stream; `readings.py` holds the paper's and the released code's own units.

Shape letters: B prompts, n positions, D hidden width, H heads, G key/value heads, r = H/G, d head width, F channels
of the feed-forward block. W_O and W_down are given channels first: (H·d, D) and (F, D).
"""

from dataclasses import dataclass, replace

import torch

# Working memory of one chunk of attention maps: small enough to stay in a core's cache, and the bound on memory.
CHUNK_BYTES = 2 * 2**20
ROW_BLOCK = 16  # query positions handled together; under a causal mask a block skips the keys it cannot see


@dataclass
class Attention:
    """What one attention layer did, in float32 or wider.

    query (B, H, n, d) and key (B, G, n, d) after normalisation and rotation, value (B, G, n, d), heads (B, H, n, d) the
    heads' outputs before W_O, allowed (B, 1, n, n) True where a position may look, real (B, n) True off the padding,
    scaling the factor on the logits, softcap the bound of Gemma 2 on them, cos and sin (B, n, rotated width),
    query_ratio (B, H, n, d) and key_ratio (B, G, n, d) by how much a query or key norm would grow what is left of a
    head when a channel is zeroed.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    heads: torch.Tensor
    allowed: torch.Tensor
    real: torch.Tensor
    scaling: float
    cos: torch.Tensor
    sin: torch.Tensor
    softcap: float | None = None
    query_ratio: torch.Tensor | None = None
    key_ratio: torch.Tensor | None = None

    @property
    def groups(self):
        return self.key.shape[1]

    @property
    def repeat(self):
        """Heads per group."""
        return self.query.shape[1] // self.key.shape[1]

    def part(self, groups):
        """The same layer with some of its groups only; `groups` is a slice."""
        heads = slice(groups.start * self.repeat, groups.stop * self.repeat)
        of_heads = {name: getattr(self, name) for name in ("query", "heads", "query_ratio")}
        of_groups = {name: getattr(self, name) for name in ("key", "value", "key_ratio")}
        cut = {name: x if x is None else x[:, heads] for name, x in of_heads.items()}
        return replace(self, **cut, **{name: x if x is None else x[:, groups] for name, x in of_groups.items()})


@dataclass
class Removal:
    """How zeroing channel j changes the logits of |h| heads: S becomes ratio · (S − Σ left_j(t) right_j(s)).

    The sum has two terms, because rotary embedding spreads a channel over two: left and right are pairs of
    (B, |h|, n, d), over query and key positions. ratio (B, |h|, n, d) is None without a query or key norm; it belongs to
    the query positions if `of_query`, else to the keys.
    """

    left: tuple[torch.Tensor, torch.Tensor]
    right: tuple[torch.Tensor, torch.Tensor]
    ratio: torch.Tensor | None
    of_query: bool


@dataclass
class OutputFactors:
    """W_O in coordinates that keep all inner products but are narrower than D, so that norms are cheap.

    single (H, d, min(D, d)) is for one head alone, joint (G, r, d, min(D, r·d)) for the heads of a group together.
    """

    single: torch.Tensor
    joint: torch.Tensor

    @classmethod
    def of(cls, w_o, groups, repeat):
        """Factor w_o (H·d, D) by orthogonal triangularisation."""

        def factor(stacked):
            return torch.linalg.qr(stacked.transpose(1, 2), mode="r").R.transpose(1, 2).contiguous()

        joint = factor(w_o.view(groups, -1, w_o.shape[1]))
        return cls(factor(w_o.view(groups * repeat, -1, w_o.shape[1])), joint.unflatten(1, (repeat, -1)))


def feed_forward(hidden, w_down_norms, real):
    """Importance of channel k of gate, up and down, which share it: ‖h[:, k]‖ · ‖W_down[:, k]‖.

    Zeroing any of the three makes h_k zero, because the activation of zero is zero (Eq 8 without its mask).
    hidden (B, n, F) is the input of W_down, w_down_norms (F,); returns (B, F).
    """
    return position_norm(hidden, real) * w_down_norms


def output(heads, w_o, real):
    """Importance of channel c of o: ‖z[:, c]‖ · ‖W_O[:, c]‖ with z the heads side by side.

    heads (B, H, n, d); returns (B, H·d).
    """
    return (heads * real[:, None, :, None]).norm(dim=2).flatten(1) * w_o.norm(dim=1)


def value(heads, w_o, real, groups):
    """Importance of channel j of v: the heads of a group add up before the norm.

    √ Σ over heads h, h' of the group of ⟨z_h[:, j], z_h'[:, j]⟩ ⟨W_O[:, hj], W_O[:, h'j]⟩.
    heads (B, H, n, d); returns (B, G·d).
    """
    batch, _, n, width = heads.shape
    grouped = (heads * real[:, None, :, None]).view(batch, groups, -1, n, width)
    weights = w_o.view(groups, -1, width, w_o.shape[1])
    inner = torch.einsum("bghnj,bginj->bghij", grouped, grouped)
    outer = torch.einsum("ghjo,gijo->ghij", weights, weights)
    return (inner * outer).sum((2, 3)).clamp_min(0).sqrt().flatten(1)


def exact(attention, factors):
    """Importance of every channel of q and of k, exactly: ‖Σ_h (softmax(S'_hj) − softmax(S_h)) V W_O^h‖.

    Zeroing row j of q removes q_j(t) R_t e_j from the rotated query of its head, so S' = S − Δ_j with
    Δ_j(t, s) = q_j(t) (R_t e_j) · k'(s) · scaling (Eq 11 and 12 with rotary embedding, carried to the sub-block's
    output). For row j of k the roles are exchanged, Δ_j(t, s) = k_j(s) q'(t) · (R_s e_j) · scaling, and the heads of the
    group add up before the norm. A query or key norm then rescales what is left of the head.

    Parameters
    ----------
    attention : Attention
    factors : OutputFactors

    Returns
    -------
    (torch.Tensor, torch.Tensor)
        q (B, H·d) and k (B, G·d).
    """
    queries, keys, repeat = query_removal(attention), key_removal(attention), attention.repeat
    q_squares, k_squares, blocks = [], [], visible_blocks(attention.allowed)
    for g in range(attention.groups):
        for h in range(g * repeat, (g + 1) * repeat):
            values = attention.value[:, g, None] @ factors.single[h]
            q_squares.append(_exact_squares(attention, values, slice(h, h + 1), queries, blocks))
        values = attention.value[:, g, None] @ factors.joint[g]
        k_squares.append(_exact_squares(attention, values, slice(g * repeat, (g + 1) * repeat), keys, blocks))
    return torch.cat(q_squares, 1).sqrt(), torch.cat(k_squares, 1).sqrt()


def position_norm(x, real):
    """Norm of every channel over the real positions: (B, n, C) to (B, C)."""
    return (x * real[..., None]).norm(dim=1)


def unrotate(x, cos, sin):
    """Undo rotary embedding (and its scale): (B, heads, n, d) to the same; channels beyond the rotated width stay."""
    width = cos.shape[-1]
    cos, sin, turned = cos[:, None], sin[:, None], x[..., :width]
    first, second = turned.chunk(2, -1)
    raw = (turned * cos - torch.cat((-second, first), -1) * sin) / (cos**2 + sin**2)
    return torch.cat((raw, x[..., width:]), -1)


def _parts(x, cos, sin):
    """Split a_j R e_j, what row j adds to the rotated vector, into its components on j and on j's partner.

    x (B, heads, n, d) is rotated; a = R⁻¹x. The rotation sends e_j to cos e_j + sin e_{j+w/2} and e_{j+w/2} to
    cos e_{j+w/2} − sin e_j, where w is the rotated width; beyond w nothing turns.
    """
    width, raw = cos.shape[-1], unrotate(x, cos, sin)
    turned, rest = raw[..., :width], raw[..., width:]
    low, high = (turned * sin[:, None]).chunk(2, -1)
    return torch.cat((turned * cos[:, None], rest), -1), torch.cat((low, -high, torch.zeros_like(rest)), -1)


def _partners(attention):
    """The channel that rotary embedding turns each channel into: (d,)."""
    channels, width = torch.arange(attention.query.shape[-1], device=attention.query.device), attention.cos.shape[-1]
    return torch.where(channels < width, (channels + width // 2) % width, channels)


def query_removal(attention):
    """What zeroing each row of q does to the logits of its head."""
    parts = _parts(attention.query, attention.cos, attention.sin)
    keys = attention.key.repeat_interleave(attention.repeat, 1)
    left = tuple(part * attention.scaling for part in parts)
    return Removal(left, (keys, keys[..., _partners(attention)]), attention.query_ratio, True)


def key_removal(attention):
    """What zeroing each row of k does to the logits of all heads of its group."""
    parts = _parts(attention.key, attention.cos, attention.sin)
    query = attention.query * attention.scaling
    right = tuple(part.repeat_interleave(attention.repeat, 1) for part in parts)
    ratio = None if attention.key_ratio is None else attention.key_ratio.repeat_interleave(attention.repeat, 1)
    return Removal((query, query[..., _partners(attention)]), right, ratio, False)


def logits_of(attention, heads=slice(None)):
    """Scaled logits of some heads, before any cap and mask: (B, |h|, n, n)."""
    groups = torch.arange(attention.query.shape[1], device=attention.key.device)[heads] // attention.repeat
    keys = attention.key[:, groups]
    return attention.query[:, heads] @ keys.transpose(-1, -2) * attention.scaling


def capped(logits, softcap):
    """Gemma 2's bound on the logits."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def masked(logits, allowed):
    """Logits with minus infinity where a position may not look; `allowed` must leave every row something."""
    return logits.masked_fill(~allowed, -torch.inf)


def _exact_squares(attention, values, heads, removal, blocks):
    """Σ over real positions of ‖Σ_h (softmax(S'_hj) − softmax(S_h)) values_h‖² for every channel j: (B, d).

    values (B, |h|, n, w) are V W_O of the heads. Inside, heads stand next to the keys, so that one matrix product
    sums over both.
    """
    logits, values, squares = logits_of(attention, heads).transpose(1, 2), narrowed(values), 0  # logits (B, n, |h|, n)
    left = [x[:, heads].permute(0, 3, 2, 1).contiguous() for x in removal.left]  # (B, d, n, |h|)
    right = [x[:, heads].permute(0, 3, 1, 2).contiguous() for x in removal.right]  # (B, d, |h|, n)
    ratio = removal.ratio
    if ratio is not None:
        ratio = ratio[:, heads].permute(0, 3, 2, 1) if removal.of_query else ratio[:, heads].permute(0, 3, 1, 2)
    for rows, columns in blocks:
        block = _Block(attention, logits, values, rows, columns)
        lefts, rights = [x[:, :, rows, :, None] for x in left], [x[:, :, None, :, columns] for x in right]
        part = ratio
        if ratio is not None:
            part = ratio[:, :, rows, :, None] if removal.of_query else ratio[:, :, None, :, columns]
        squares = squares + block.squares(lefts, rights, part)
    return squares


def narrowed(values):
    """The same inner products between keys in lower triangular form, when there are fewer keys than coordinates.

    values (B, |h|, n, w) becomes (B, |h|, n, |h|·n) with zeros in |h|·(s + 1) and beyond for key s: a block of
    queries that sees s keys then needs |h|·s coordinates. The factorisation runs in float64, with a jitter far below
    its rounding, because keys may repeat.
    """
    batch, heads, n, width = values.shape
    if heads * n > width:
        return values
    keys = values.transpose(1, 2).flatten(1, 2).double()  # (B, n·|h|, w), the heads of a key side by side
    gram = keys @ keys.transpose(1, 2)
    jitter = 1e-13 * gram.diagonal(dim1=1, dim2=2).sum(1) + torch.finfo(values.dtype).tiny
    gram.diagonal(dim1=1, dim2=2).add_(jitter[:, None])
    triangle = torch.linalg.cholesky(gram).to(values.dtype)
    return triangle.unflatten(1, (n, heads)).transpose(1, 2)


def visible_blocks(allowed):
    """Blocks of query positions with the range of keys that any of them may see: pairs of slices."""
    seen = allowed.any(0)[0]
    blocks = []
    for start in range(0, seen.shape[0], ROW_BLOCK):
        rows = slice(start, min(start + ROW_BLOCK, seen.shape[0]))
        columns = seen[rows].any(0).nonzero().flatten()
        blocks.append((rows, slice(int(columns[0]), int(columns[-1]) + 1)))
    return blocks


class _Block:
    """A block of query positions and the keys they see, in some heads that add up."""

    def __init__(self, attention, logits, values, rows, columns):
        self.softcap, self.allowed = attention.softcap, attention.allowed[:, 0, rows, None, columns]
        self.logits = logits[:, rows, :, columns]
        triangular = values.shape[1] * values.shape[2] == values.shape[3]
        width = values.shape[1] * columns.stop if triangular else values.shape[3]
        self.values = values[:, :, columns, :width].flatten(1, 2).contiguous()
        self.real = attention.real[:, None, rows, None]
        self.padded = not bool(self.real.all())
        if self.softcap is None:
            self.logits = masked(self.logits, self.allowed)
        self.before = torch.softmax(masked(capped(self.logits, self.softcap), self.allowed), -1)[:, None]
        self.logits = self.logits[:, None].contiguous()

    def squares(self, left, right, ratio):
        """Squared change of the output for every channel: (B, d), in chunks that fit the working memory."""
        step = max(1, CHUNK_BYTES // (self.logits.numel() * self.logits.element_size()))
        chunks = [slice(start, start + step) for start in range(0, left[0].shape[1], step)]
        return torch.cat([self._chunk(*([x[:, c] for x in pair] for pair in (left, right)), None if ratio is None else ratio[:, c]) for c in chunks], 1)

    def _chunk(self, left, right, ratio):
        changed = torch.addcmul(self.logits, left[0], right[0], value=-1)  # (B, |chunk|, rows, |h|, keys)
        changed.addcmul_(left[1], right[1], value=-1)
        if ratio is not None:
            changed *= ratio
        if self.softcap is not None or ratio is not None:
            changed = masked(capped(changed, self.softcap), self.allowed[:, None])
        maps = torch.softmax(changed, -1).sub_(self.before)
        total = (maps.flatten(3).flatten(1, 2) @ self.values).unflatten(1, maps.shape[1:3])
        if self.padded:
            total *= self.real
        return total.flatten(2).norm(dim=2).square()
