"""Neuron importance: the closed forms, as pure functions of what one forward pass computed.

The importance of a neuron for one prompt is the Frobenius norm, over the prompt's real positions, of the
change in its sub-block's output (attention or feed-forward, before any post-norm) when the neuron's
parameters, its bias with them, are set to zero (Zhao et al. 2025, Eq 1). `exact` and `first_order.py` share that
unit, a norm in the residual stream; `paper_and_released.py` holds the paper's and the released code's own units.

Shape letters: B prompts, n positions, D hidden width, H heads, G key/value heads, r = H/G, d head width, F channels
of the feed-forward block. W_O and W_down are given channels first: (H·d, D) and (F, D).

Five of the seven projections cost nothing, because zeroing a channel takes one summand away from a product: what is
taken from the output is that channel's activation times its row of W_O or W_down (`feed_forward`, `output`, `value`).
q and k stand inside the softmax, so `exact` runs the softmax again for every channel, and nothing else:

1. `query_removal`, `key_removal`: what zeroing each channel takes from the logits, as outer products (`Removal`).
2. `_Maps.squares`: for a block of queries and a chunk of channels, the changed logits, their softmax, minus the
   probabilities before.
3. That change of probabilities times V W_O, squared and summed over positions. V W_O is first written in coordinates
   that keep all inner products and are as few as possible (`OutputFactors`, `narrowed`).

An example: B = 2 prompts of n = 64 positions, H = 8 heads of width d = 64 in G = 4 groups, so r = 2. One group at a time,
its logits are (2, 2, 64, 64), over prompt, head, query, key. Zeroing each row of q changes one head, so the heads go to the
batch: logits (4, 1, 64, 64), changed logits (4, 64 channels, 64, 1, 64), and V W_O (4, 1, 64, 64) in the head's own 64
coordinates instead of D = 512. Zeroing a row of k changes both heads, whose outputs add up: changed logits
(2, 64 channels, 64 queries, 2 heads, 64 keys) times V W_O (2, 2 · 64, 128), where the first head has only zeros in the last
64 coordinates and is left out of them (`_stairs`). Every product becomes one number a prompt and channel: q (2, 512), k (2, 256).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

# Working memory of one chunk of attention maps: small enough to stay in a core's cache, and the bound on memory.
CHUNK_BYTES = 2 * 2**20
ROW_BLOCK = (
    16  # query positions handled together; under a causal mask a block skips the keys it cannot see
)


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
    def groups(self) -> int:
        return self.key.shape[1]

    @property
    def repeat(self) -> int:
        """Heads per group."""
        return self.query.shape[1] // self.key.shape[1]

    def by_prompts(self) -> Iterator["Attention"]:
        """The layer in parts of so many prompts that one group's maps fit in the working memory."""
        tensors = {
            name: x for name, x in vars(self).items() if isinstance(x, torch.Tensor) and len(x) > 1
        }
        batch, heads, n, _ = self.query.shape
        step = max(1, CHUNK_BYTES // (heads // self.groups * n * n * self.query.element_size()))
        for start in range(0, batch, step):
            yield replace(self, **{name: x[start : start + step] for name, x in tensors.items()})

    def part(self, groups: slice) -> "Attention":
        """The same layer with some of its groups only; `groups` is a slice."""
        heads = slice(groups.start * self.repeat, groups.stop * self.repeat)
        of_heads = {name: getattr(self, name) for name in ("query", "heads", "query_ratio")}
        of_groups = {name: getattr(self, name) for name in ("key", "value", "key_ratio")}
        cut = {name: x if x is None else x[:, heads] for name, x in of_heads.items()}
        return replace(
            self, **cut, **{name: x if x is None else x[:, groups] for name, x in of_groups.items()}
        )


@dataclass
class Removal:
    """What zeroing each channel of q or k takes from the logits: S of |h| heads becomes ratio · (S − Σ left_j(t) right_j(s)).

    The sum has two terms, because rotary embedding spreads a channel over two: left and right are pairs of
    (B, |h|, n, d), over query and key positions. ratio (B, |h|, n, d) is None without a query or key norm; it belongs to
    the query positions if `of_query`, else to the keys.
    """

    left: tuple[torch.Tensor, torch.Tensor]
    right: tuple[torch.Tensor, torch.Tensor]
    ratio: torch.Tensor | None
    of_query: bool

    def _map(self, left, right):
        """The same with a function for what varies over queries and one for what varies over keys."""
        of_ratio = left if self.of_query else right
        ratio = self.ratio if self.ratio is None else of_ratio(self.ratio)
        return Removal(
            tuple(map(left, self.left)), tuple(map(right, self.right)), ratio, self.of_query
        )

    def only(self, channels: torch.Tensor) -> "Removal":
        """The part of some channels; `channels` (d,) is a mask."""
        return (
            self
            if channels.all()
            else self._map(lambda x: x[..., channels], lambda x: x[..., channels])
        )

    def apart(self) -> "Removal":
        """Every head on its own."""
        return self._map(by_head, by_head)

    def channels_first(self) -> "Removal":
        """Laid out for maps (B, d, n, |h|, n): left (B, d, n, |h|, 1) and right (B, d, 1, |h|, n)."""
        return self._map(
            lambda x: x.permute(0, 3, 2, 1).contiguous()[..., None],
            lambda x: x.permute(0, 3, 1, 2).contiguous()[:, :, None],
        )

    def block(self, rows: slice, columns: slice) -> "Removal":
        """The part of some queries and keys."""
        return self._map(lambda x: x[:, :, rows], lambda x: x[..., columns])

    def chunks(self, size: int) -> Iterator["Removal"]:
        """The parts of `size` channels each."""
        for start in range(0, self.left[0].shape[1], size):

            def channels(x):
                return x[:, start : start + size]

            yield self._map(channels, channels)

    def apply(self, logits: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Changed logits (B, d, n, |h|, n) from logits (B, 1, n, |h|, n), written to `out`."""
        changed = torch.addcmul(logits, self.left[0], self.right[0], value=-1, out=out)
        changed.addcmul_(self.left[1], self.right[1], value=-1)
        return changed if self.ratio is None else changed.mul_(self.ratio)


class Workspace:
    """Memory that chunks share: asking for it anew each time costs more than what is computed in it."""

    def __init__(self):
        self._buffers = {}

    def take(self, name: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """An uninitialised tensor of the dtype and device of `like`; it overwrites the last one of that name."""
        buffer, size = self._buffers.get(name), math.prod(shape)
        if (
            buffer is None
            or buffer.numel() < size
            or buffer.dtype != like.dtype
            or buffer.device != like.device
        ):
            buffer = self._buffers[name] = like.new_empty(size)
        return buffer[:size].view(shape)


@dataclass
class OutputFactors:
    """What the closed forms need of W_O; computed once, because it depends on the weights alone.

    norms (H·d,) of the rows of W_O, inner (G, r, r, d) the inner products of the rows that one channel of v reaches.
    single (H, d, min(D, d)) and joint (G, r, d, min(D, r·d)) are W_O in coordinates that keep all inner products but are
    narrower than D, for one head alone and for the heads of a group together; lower triangular, so that the first head of a
    group has zeros beyond d, the second beyond 2d.
    """

    norms: torch.Tensor
    inner: torch.Tensor
    single: torch.Tensor
    joint: torch.Tensor

    @classmethod
    def of(cls, w_o: torch.Tensor, groups: int, repeat: int) -> "OutputFactors":
        """Factor w_o (H·d, D) by orthogonal triangularisation."""

        def factor(stacked):
            return torch.linalg.qr(stacked.transpose(1, 2), mode="r").R.transpose(1, 2).contiguous()

        joint = factor(w_o.view(groups, -1, w_o.shape[1])).unflatten(1, (repeat, -1))
        inner = torch.einsum("ghjo,gijo->ghij", joint, joint)
        return cls(w_o.norm(dim=1), inner, factor(joint.flatten(0, 1)), joint)

    def part(self, groups: slice) -> "OutputFactors":
        """The same for some of the groups only; `groups` is a slice."""
        repeat, width = self.joint.shape[1:3]
        heads = slice(groups.start * repeat, groups.stop * repeat)
        rows = slice(heads.start * width, heads.stop * width)
        return OutputFactors(
            self.norms[rows], self.inner[groups], self.single[heads], self.joint[groups]
        )


def feed_forward(
    hidden: torch.Tensor, w_down_norms: torch.Tensor, real: torch.Tensor
) -> torch.Tensor:
    """Importance of channel k of gate, up and down, which share it: ‖h[:, k]‖ · ‖W_down[:, k]‖.

    Zeroing any of the three makes h_k zero, because the activation of zero is zero (Eq 8 without its mask).
    hidden (B, n, F) is the input of W_down, w_down_norms (F,); returns (B, F).
    """
    return position_norm(hidden, real) * w_down_norms


def output(heads: torch.Tensor, factors: OutputFactors, real: torch.Tensor) -> torch.Tensor:
    """Importance of channel c of o: ‖z[:, c]‖ · ‖W_O[:, c]‖ with z the heads side by side.

    heads (B, H, n, d); returns (B, H·d).
    """
    return position_norm(heads, real[:, None]).flatten(1) * factors.norms


def value(heads: torch.Tensor, factors: OutputFactors, real: torch.Tensor) -> torch.Tensor:
    """Importance of channel j of v: the heads of a group add up before the norm.

    √ Σ over heads h, h' of the group of ⟨z_h[:, j], z_h'[:, j]⟩ ⟨W_O[:, hj], W_O[:, h'j]⟩.
    heads (B, H, n, d); returns (B, G·d).
    """
    grouped = (heads * real[:, None, :, None]).unflatten(1, factors.inner.shape[:2])
    pairs = [(h, i) for h in range(grouped.shape[2]) for i in range(grouped.shape[2])]
    products = (
        ((grouped[:, :, h] * grouped[:, :, i]).sum(2)) * factors.inner[:, h, i] for h, i in pairs
    )
    return sum(products).clamp_min(0).sqrt().flatten(1)


def exact(
    attention: Attention,
    factors: OutputFactors,
    workspace: Workspace,
    wanted: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Importance of every channel of q and of k, exactly: ‖Σ_h (softmax(S'_hj) − softmax(S_h)) V W_O^h‖.

    Zeroing row j of q removes q_j(t) R_t e_j from the rotated query of its head, so S' = S − Δ_j with
    Δ_j(t, s) = q_j(t) (R_t e_j) · k'(s) · scaling (Eq 11 and 12 with rotary embedding, carried to the sub-block's
    output). For row j of k the roles are exchanged, Δ_j(t, s) = k_j(s) q'(t) · (R_s e_j) · scaling, and the heads of the
    group add up before the norm. A query or key norm then rescales what is left of the head.

    Parameters
    ----------
    attention : Attention
    factors : OutputFactors
    workspace : Workspace
        One for all layers.
    wanted : (torch.Tensor, torch.Tensor), optional
        Masks of the channels to measure, q (G, d), shared by the heads of a group, and k (G, d); all without it.

    Returns
    -------
    (torch.Tensor, torch.Tensor)
        q (B, H·d) and k (B, G·d), infinite where not wanted.
    """
    parts = [_exact(part, factors, workspace, wanted) for part in attention.by_prompts()]
    return tuple(torch.cat(scores) for scores in zip(*parts))


def _exact(attention, factors, workspace, wanted):
    every = torch.ones_like(attention.key[0, :, 0], dtype=torch.bool)  # (G, d)
    wanted_q, wanted_k = (every, every) if wanted is None else wanted
    blocks = visible_blocks(attention.allowed)
    q = torch.full_like(attention.query[:, :, 0], torch.inf).unflatten(
        1, (attention.groups, -1)
    )  # (B, G, r, d)
    k = torch.full_like(attention.key[:, :, 0], torch.inf)
    for g in (wanted_q | wanted_k).any(1).nonzero().flatten().tolist():
        part, weights = attention.part(slice(g, g + 1)), factors.part(slice(g, g + 1))
        maps = _Maps.of(part, workspace)
        if wanted_q[g].any():
            removal, values = (
                query_removal(part).only(wanted_q[g]).apart(),
                by_head(part.value @ weights.single),
            )
            q[:, g, :, wanted_q[g]] = (
                maps.apart().squares(values, removal, blocks).unflatten(0, (-1, attention.repeat))
            )
        if wanted_k[g].any():
            removal, values = key_removal(part).only(wanted_k[g]), part.value @ weights.joint[0]
            k[:, g, wanted_k[g]] = maps.squares(values, removal, blocks)
    return q.flatten(1).sqrt(), k.flatten(1).sqrt()


def position_norm(x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Norm of every channel over the real positions: x (…, n, C) and real (…, n) to (…, C)."""
    return (real.to(x.dtype)[..., None, :] @ x.square())[..., 0, :].sqrt()


def unrotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
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
    return torch.cat((turned * cos[:, None], rest), -1), torch.cat(
        (low, -high, torch.zeros_like(rest)), -1
    )


def _partners(attention):
    """The channel that rotary embedding turns each channel into: (d,)."""
    channels, width = (
        torch.arange(attention.query.shape[-1], device=attention.query.device),
        attention.cos.shape[-1],
    )
    return torch.where(channels < width, (channels + width // 2) % width, channels)


def query_removal(attention: Attention) -> Removal:
    """What zeroing each row of q does to the logits of its head."""
    parts = _parts(attention.query, attention.cos, attention.sin)
    keys = attention.key.repeat_interleave(attention.repeat, 1)
    left = tuple(part * attention.scaling for part in parts)
    return Removal(left, (keys, keys[..., _partners(attention)]), attention.query_ratio, True)


def key_removal(attention: Attention) -> Removal:
    """What zeroing each row of k does to the logits of all heads of its group."""
    parts = _parts(attention.key, attention.cos, attention.sin)
    query = attention.query * attention.scaling
    right = tuple(part.repeat_interleave(attention.repeat, 1) for part in parts)
    ratio = (
        None
        if attention.key_ratio is None
        else attention.key_ratio.repeat_interleave(attention.repeat, 1)
    )
    return Removal((query, query[..., _partners(attention)]), right, ratio, False)


def logits_of(attention: Attention) -> torch.Tensor:
    """Scaled logits before any cap and mask: (B, H, n, n)."""
    keys = attention.key.repeat_interleave(attention.repeat, 1)
    return attention.query @ keys.transpose(-1, -2) * attention.scaling


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Gemma 2's bound on the logits."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def masked(logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Logits with minus infinity where a position may not look; `allowed` must leave every row something."""
    return logits.masked_fill(~allowed, -torch.inf)


def visible_blocks(allowed: torch.Tensor) -> list[tuple[slice, slice]]:
    """Blocks of query positions with the range of keys that any of them may see: pairs of slices."""
    seen = allowed.any(0)[0]
    blocks = []
    for start in range(0, seen.shape[0], ROW_BLOCK):
        rows = slice(start, min(start + ROW_BLOCK, seen.shape[0]))
        columns = seen[rows].any(0).nonzero().flatten()
        blocks.append((rows, slice(int(columns[0]), int(columns[-1]) + 1)))
    return blocks


@dataclass
class _Maps:
    """The attention maps that a removal changes, of heads whose outputs add up: logits and probabilities `before`, (B, |h|, n, n)."""

    logits: torch.Tensor
    before: torch.Tensor
    allowed: torch.Tensor
    real: torch.Tensor
    softcap: float | None
    head_width: int
    workspace: Workspace

    @classmethod
    def of(cls, attention: Attention, workspace: Workspace) -> "_Maps":
        """The maps of all heads of a layer."""
        logits, allowed = logits_of(attention), attention.allowed
        before = torch.softmax(masked(capped(logits, attention.softcap), allowed), -1)
        return cls(
            logits,
            before,
            allowed,
            attention.real,
            attention.softcap,
            attention.query.shape[-1],
            workspace,
        )

    @property
    def padded(self):
        """Whether some position does not count."""
        return not bool(self.real.all())

    def apart(self) -> "_Maps":
        """The same maps with every head on its own: B becomes B·|h|."""
        heads = self.logits.shape[1]
        allowed, real = (x.repeat_interleave(heads, 0) for x in (self.allowed, self.real))
        return replace(
            self,
            logits=by_head(self.logits),
            before=by_head(self.before),
            allowed=allowed,
            real=real,
        )

    def squares(self, values, removal, blocks):
        """Σ over real positions of ‖Σ_h (softmax(S'_hj) − softmax(S_h)) values_h‖² for every channel j: (B, d).

        values (B, |h|, n, w) are V W_O of the heads. Inside, heads stand next to the keys, so that one matrix product
        sums over both. Zeros are left out: the h-th head of a group has none but h·d coordinates (`OutputFactors`), and
        where `narrowed` values at least halve the work, s keys have only |h|·s.
        """
        heads, n, width = values.shape[1:]
        step = None if 2 * heads * n <= width else self.head_width
        values, removal = narrowed(values) if step is None else values, removal.channels_first()
        return sum(
            _block_squares(self, _stairs(values, columns, step), removal, rows, columns)
            for rows, columns in blocks
        )


def by_head(x: torch.Tensor) -> torch.Tensor:
    """Heads as further members of the batch: (B, |h|, …) to (B·|h|, 1, …)."""
    return x.flatten(0, 1)[:, None]


def narrowed(values: torch.Tensor) -> torch.Tensor:
    """The same inner products between keys in lower triangular form.

    values (B, |h|, n, w) becomes (B, |h|, n, |h|·n) with zeros in |h|·(s + 1) and beyond for key s. The factorisation
    runs in float64, with a jitter far below its rounding, because keys may repeat.
    """
    batch, heads, n, width = values.shape
    keys = (
        values.transpose(1, 2).flatten(1, 2).double()
    )  # (B, n·|h|, w), the heads of a key side by side
    gram = keys @ keys.transpose(1, 2)
    jitter = 1e-13 * gram.diagonal(dim1=1, dim2=2).sum(1) + torch.finfo(values.dtype).tiny
    gram.diagonal(dim1=1, dim2=2).add_(jitter[:, None])
    triangle = torch.linalg.cholesky(gram).to(values.dtype)
    return triangle.unflatten(1, (n, heads)).transpose(1, 2)


def _stairs(values, columns, step):
    """The values of some keys without their zeros, which lie below a staircase: a step for every head, or none.

    Returns pairs of the first head that counts and (B, |heads|·keys, coordinates). A head has `step` more coordinates than
    the head before it; `step` is None for narrowed values.
    """
    if step is None:
        return [
            (0, values[:, :, columns, : values.shape[1] * columns.stop].flatten(1, 2).contiguous())
        ]
    starts = range(0, values.shape[3], step)
    return [
        (h, values[:, h:, columns, start : start + step].flatten(1, 2).contiguous())
        for h, start in enumerate(starts)
    ]


def _block_squares(maps, values, removal, rows, columns):
    """`_Maps.squares` for a block of queries and the keys they see, in chunks of channels that fit the working memory."""
    logits, before = (
        x[:, :, rows, columns].transpose(1, 2)[:, None].contiguous()
        for x in (maps.logits, maps.before)
    )
    allowed, real = maps.allowed[:, :, rows, None, columns], maps.real[:, None, rows, None]
    removal = removal.block(rows, columns)
    limited = maps.softcap is not None or removal.ratio is not None
    logits, squares, take = logits if limited else masked(logits, allowed), [], maps.workspace.take
    for part in removal.chunks(max(1, CHUNK_BYTES // (logits.numel() * logits.element_size()))):
        shape = (
            len(logits),
            part.left[0].shape[1],
            *logits.shape[2:],
        )  # (B, |chunk|, rows, |h|, keys)
        changed = part.apply(logits, take("changed", shape, logits))
        if limited:
            changed = masked(capped(changed, maps.softcap), allowed)
        change = torch.softmax(changed, -1, out=take("change", shape, logits)).sub_(before)
        if maps.padded:
            change *= real[..., None]
        squares.append(sum(_squared_norm(change[..., h:, :], x, maps.workspace) for h, x in values))
    return torch.cat(squares, 1)


def _squared_norm(change, values, workspace):
    """Squared norm over queries and coordinates: change (B, C, n, |h|, keys), values (B, |h|·keys, w), result (B, C)."""
    batch, channels, n = change.shape[:3]
    total = workspace.take("total", (batch, channels * n, values.shape[2]), values)
    torch.bmm(change.flatten(3).flatten(1, 2), values, out=total)
    return total.view(batch, channels, -1).norm(dim=2).square()
