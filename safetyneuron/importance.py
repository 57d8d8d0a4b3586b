"""Neuron importance: the closed forms, as pure functions of what one forward pass computed.

The importance of a neuron for one prompt is the Frobenius norm, over the prompt's real positions, of the
change in its sub-block's output (attention or feed-forward, before any post-norm) when the neuron's
parameters, its bias with them, are set to zero (Zhao et al. 2025, Eq 1). `exact_*` and `first_order_*` share that
unit, a norm in the residual stream; `readings.py` holds the paper's and the released code's own units.

Shape letters: B prompts, n positions, D hidden width, H heads, G key/value heads, r = H/G, d head width, F channels
of the feed-forward block. W_O and W_down are given channels first: (H·d, D) and (F, D).
"""

from dataclasses import dataclass

import torch

# Working memory of one chunk of attention maps: small enough to stay in a core's cache, and the bound on memory.
CHUNK_BYTES = 2 * 2**20
ROW_BLOCK = 32  # query positions handled together; under a causal mask a block skips the keys it cannot see


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


@dataclass
class Removal:
    """How zeroing channel j changes the logits of |h| heads: S becomes ratio · (S − left · right).

    left (B, |h|, d, n, 2) over query positions, right (B, |h|, d, 2, n) over key positions: rotary embedding spreads a
    channel over two. ratio is None without a query or key norm, else (B, |h|, d, n, 1) or (B, |h|, d, 1, n).
    """

    left: torch.Tensor
    right: torch.Tensor
    ratio: torch.Tensor | None


def feed_forward(hidden, w_down, real):
    """Importance of channel k of gate, up and down, which share it: ‖h[:, k]‖ · ‖W_down[:, k]‖.

    Zeroing any of the three makes h_k zero, because the activation of zero is zero (Eq 8 without its mask).
    hidden (B, n, F) is the input of W_down; returns (B, F).
    """
    return position_norm(hidden, real) * w_down.norm(dim=1)


def output(heads, w_o, real):
    """Importance of channel c of o: ‖z[:, c]‖ · ‖W_O[:, c]‖ with z the heads side by side.

    heads (B, H, n, d); returns (B, H·d).
    """
    return position_norm(heads.transpose(1, 2).flatten(2), real) * w_o.norm(dim=1)


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


def exact_query(attention, w_o_factors):
    """Importance of channel j of q, exactly: ‖(softmax(S − Δ_j) − softmax(S)) V_h W_O^h‖.

    Zeroing row j removes q_j(t) R_t e_j from the rotated query, so Δ_j(t, s) = q_j(t) (R_t e_j) · k'(s) · scaling
    (Eq 11 and 12 with rotary embedding, carried to the sub-block's output). A query norm then rescales what is left
    of the head. w_o_factors: see `factor_output`; returns (B, H·d).
    """
    squares = [
        _exact_squares(attention, w_o_factors, g, [h], query_removal(attention, h))
        for g in range(attention.groups)
        for h in range(g * attention.repeat, (g + 1) * attention.repeat)
    ]
    return torch.cat(squares, 1).sqrt()


def exact_key(attention, w_o_factors):
    """Importance of channel j of k, exactly: as for q with the roles exchanged, heads of a group added before the norm.

    Δ_j(t, s) = k_j(s) q'(t) · (R_s e_j) · scaling for every head of the group. Returns (B, G·d).
    """
    squares = []
    for g in range(attention.groups):
        heads = list(range(g * attention.repeat, (g + 1) * attention.repeat))
        squares.append(_exact_squares(attention, w_o_factors, g, heads, key_removal(attention, heads)))
    return torch.cat(squares, 1).sqrt()


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


def query_removal(attention, head):
    """What zeroing each row of q of one head does to its logits."""
    group, partners = head // attention.repeat, _partners(attention)
    channel, partner = _parts(attention.query[:, head, None], attention.cos, attention.sin)
    other = attention.key[:, group, None]
    left = torch.stack((channel, partner), -1).transpose(2, 3) * attention.scaling
    right = torch.stack((other, other[..., partners]), -1).permute(0, 1, 3, 4, 2)
    ratio = None if attention.query_ratio is None else attention.query_ratio[:, head, None].transpose(2, 3)[..., None]
    return Removal(left.contiguous(), right.contiguous(), ratio)


def key_removal(attention, heads):
    """What zeroing each row of k of one group does to the logits of the group's heads."""
    group, partners = heads[0] // attention.repeat, _partners(attention)
    channel, partner = _parts(attention.key[:, group, None], attention.cos, attention.sin)
    other = attention.query[:, heads]
    left = torch.stack((other, other[..., partners]), -1).transpose(2, 3) * attention.scaling
    right = torch.stack((channel, partner), -1).permute(0, 1, 3, 4, 2)
    ratio = None if attention.key_ratio is None else attention.key_ratio[:, group, None].transpose(2, 3)[..., None, :]
    return Removal(left.contiguous(), right.contiguous(), ratio)


def logits_of(attention, heads):
    """Scaled logits of some heads of one group, before any cap and mask: (B, |h|, n, n)."""
    keys = attention.key[:, heads[0] // attention.repeat, None]
    return attention.query[:, heads] @ keys.transpose(-1, -2) * attention.scaling


def capped(logits, softcap):
    """Gemma 2's bound on the logits."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def masked(logits, allowed):
    """Logits with minus infinity where a position may not look; `allowed` must leave every row something."""
    return logits.masked_fill(~allowed, -torch.inf)


def factor_output(w_o, groups, repeat):
    """W_O of each group in an orthonormal basis of its heads: (G, r, d, min(D, r·d)), inner products unchanged.

    The norm of Σ_h x_h W_O^h is that of Σ_h x_h factor_h, which is r·d wide and not D.
    """
    stacked = w_o.view(groups, -1, w_o.shape[1])
    triangle = torch.linalg.qr(stacked.transpose(1, 2), mode="r").R
    return triangle.transpose(1, 2).unflatten(1, (repeat, -1)).contiguous()


def _exact_squares(attention, w_o_factors, group, heads, removal):
    """Σ over real positions of ‖Σ_h (softmax(S'_hj) − softmax(S_h)) V W_O^h‖² for every channel j: (B, d)."""
    first = group * attention.repeat
    factors = w_o_factors[group][[h - first for h in heads]]
    if len(heads) == 1:  # a single head needs only its own d directions
        factors = torch.linalg.qr(factors[0].T, mode="r").R.T[None]
    values = attention.value[:, group, None] @ factors
    logits, squares = logits_of(attention, heads), 0
    for rows, columns in visible_blocks(attention.allowed):
        block = _Block(attention, logits, values, removal, rows, columns)
        squares = squares + torch.cat([block.squares(chunk) for chunk in block.chunks()], 1)
    return squares


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
    """A block of query positions and the keys they see, for all channels of one group."""

    def __init__(self, attention, logits, values, removal, rows, columns):
        self.logits, self.values = logits[:, :, rows, columns], values[:, :, columns]
        self.left, self.right = removal.left[..., rows, :], removal.right[..., columns]
        self.ratio = removal.ratio
        if self.ratio is not None:
            self.ratio = self.ratio[..., rows, :] if self.ratio.shape[-1] == 1 else self.ratio[..., columns]
        self.allowed, self.softcap = attention.allowed[:, :, rows, columns], attention.softcap
        self.real = attention.real[:, None, rows, None].to(logits.dtype)
        if self.softcap is None:
            self.logits = masked(self.logits, self.allowed)
        self.before = torch.softmax(masked(capped(self.logits, self.softcap), self.allowed), -1)

    def chunks(self):
        """Ranges of channels whose maps fit the working memory."""
        width, size = self.left.shape[2], self.logits.numel() * self.logits.element_size()
        step = max(1, CHUNK_BYTES // size)
        return [slice(start, min(start + step, width)) for start in range(0, width, step)]

    def squares(self, chunk):
        """Squared change of the output per channel of the chunk: (B, |chunk|)."""
        changed = self.left[:, :, chunk] @ self.right[:, :, chunk]
        torch.sub(self.logits[:, :, None], changed, out=changed)
        if self.ratio is not None:
            changed = changed * self.ratio[:, :, chunk]
        if self.softcap is not None or self.ratio is not None:
            changed = masked(capped(changed, self.softcap), self.allowed[:, :, None])
        maps = torch.softmax(changed, -1).sub_(self.before[:, :, None])
        total = maps[:, 0].flatten(1, 2) @ self.values[:, 0]
        for h in range(1, maps.shape[1]):
            total.baddbmm_(maps[:, h].flatten(1, 2), self.values[:, h])
        return total.unflatten(1, maps.shape[2:4]).mul_(self.real).square_().sum((2, 3))
