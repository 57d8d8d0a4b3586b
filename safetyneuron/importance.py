"""Neuron importance: closed forms as pure tensor functions, and the hooked forward pass that feeds them.

The importance of a neuron for one prompt is the Frobenius norm, over the prompt's real positions, of the
change in its sub-block's output (attention or feed-forward, before any post-norm) when the neuron's
parameters are set to zero (Zhao et al. 2025, Eq 1). All closed forms share that unit.

Shape letters: B prompts, n positions, D hidden width, H heads, G key/value heads, d head width, F channels of
the feed-forward block.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from safetyneuron.architecture import PROJECTIONS, Architecture

# Working memory of one chunk of attention maps: about the size of a core's second-level cache.
CHUNK_BYTES = 4 * 2**20


@dataclass
class Attention:
    """What one attention layer did, in float32 or wider.

    query (B, H, n, d) and key (B, G, n, d) after rotation, value (B, G, n, d), heads (B, H, n, d) the heads'
    outputs before W_O, allowed (B, 1, n, n) True where a position may look, real (B, n) True off the padding,
    cos and sin (B, n, rotated width) or None, scaling the factor on the logits.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    heads: torch.Tensor
    allowed: torch.Tensor
    real: torch.Tensor
    scaling: float
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None


def feed_forward(hidden, w_down, real):
    """Importance of channel k of gate, up and down, which share it: ‖h[:, k]‖ · ‖W_down[:, k]‖.

    Zeroing any of the three makes h_k zero, because the activation of zero is zero (Eq 8 without its mask).
    hidden (B, n, F) is the input of W_down (channels first: (F, D)); returns (B, F).
    """
    return _position_norm(hidden, real) * w_down.norm(dim=1)


def output(heads, w_o, real):
    """Importance of channel c of o: ‖z[:, c]‖ · ‖W_O[:, c]‖ with z the heads side by side.

    heads (B, H, n, d), w_o (H·d, D); returns (B, H·d).
    """
    return _position_norm(heads.transpose(1, 2).flatten(2), real) * w_o.norm(dim=1)


def value(heads, w_o, real, groups):
    """Importance of channel j of v: the heads of a group add up before the norm.

    √ Σ over heads h, h' of the group of ⟨z_h[:, j], z_h'[:, j]⟩ ⟨W_O[:, hj], W_O[:, h'j]⟩.
    heads (B, H, n, d), w_o (H·d, D); returns (B, G·d).
    """
    batch, _, n, width = heads.shape
    grouped = (heads * real[:, None, :, None]).view(batch, groups, -1, n, width)
    weights = w_o.view(groups, -1, width, w_o.shape[1])
    inner = torch.einsum("bghnj,bginj->bghij", grouped, grouped)
    outer = torch.einsum("ghjo,gijo->ghij", weights, weights)
    return (inner * outer).sum((2, 3)).clamp_min(0).sqrt().flatten(1)


def query(attention, w_o):
    """Importance of channel j of q, exactly: ‖(softmax(S − Δ_j) − softmax(S)) V_h W_O^h‖.

    Zeroing row j removes q_j(t) R_t e_j from the rotated query, so Δ_j(t, s) = q_j(t) (R_t e_j) · k'(s) · scaling
    (Eq 11 and 12 with rotary embedding and carried to the sub-block's output). w_o (H·d, D); returns (B, H·d).
    """
    groups, repeat = attention.key.shape[1], attention.query.shape[1] // attention.key.shape[1]
    channel, partner = _unrotated_parts(attention.query, attention.cos, attention.sin)
    heads = [
        _softmax_change(attention, w_o, g, [h], lambda j, h=h, g=g: _rank_two(channel[:, h], partner[:, h], attention.key[:, g], j, attention))
        for g in range(groups)
        for h in range(g * repeat, (g + 1) * repeat)
    ]
    return torch.cat(heads, 1)


def key(attention, w_o):
    """Importance of channel j of k, exactly: as for q with the roles exchanged, heads of a group added before the norm.

    Δ_j(t, s) = k_j(s) q'(t) · (R_s e_j) · scaling for every head of the group. w_o (H·d, D); returns (B, G·d).
    """
    groups, repeat = attention.key.shape[1], attention.query.shape[1] // attention.key.shape[1]
    channel, partner = _unrotated_parts(attention.key, attention.cos, attention.sin)

    def delta(j, group, heads):
        parts = [_rank_two(channel[:, group], partner[:, group], attention.query[:, h], j, attention) for h in heads]
        return torch.stack(parts, 2).transpose(-1, -2).flatten(1, 2)

    columns = []
    for g in range(groups):
        heads = list(range(g * repeat, (g + 1) * repeat))
        columns.append(_softmax_change(attention, w_o, g, heads, lambda j, g=g, heads=heads: delta(j, g, heads)))
    return torch.cat(columns, 1)


def _position_norm(x, real):
    """Norm of every channel over the real positions: (B, n, C) to (B, C)."""
    return (x * real[..., None]).norm(dim=1)


def _unrotated_parts(x, cos, sin):
    """Split a_j R e_j, what row j adds to the rotated vector, into its components on j and on j's partner.

    x (B, heads, n, d) is rotated; a = R⁻¹x. The rotation sends e_j to cos e_j + sin e_{j+r/2} and e_{j+r/2} to
    cos e_{j+r/2} − sin e_j, where r is the rotated width; beyond r nothing turns. cos² + sin² may carry a scale.
    """
    if cos is None:
        return x, torch.zeros_like(x)
    width = cos.shape[-1]
    cos, sin, turned = cos[:, None], sin[:, None], x[..., :width]
    first, second = turned.chunk(2, -1)
    raw = (turned * cos - torch.cat((-second, first), -1) * sin) / (cos**2 + sin**2)
    low, high = (raw * sin).chunk(2, -1)
    rest = x[..., width:]
    return torch.cat((raw * cos, rest), -1), torch.cat((low, -high, torch.zeros_like(rest)), -1)


def _partners(channels, attention):
    """The channel that rotary embedding turns each channel into."""
    width = 0 if attention.cos is None else attention.cos.shape[-1]
    return torch.where(channels < width, (channels + width // 2) % max(width, 1), channels)


def _rank_two(channel, partner, other, j, attention):
    """Δ_j for several channels j: (B, n, d) parts against the other side (B, n, d) gives (B, |j|, n, n)."""
    left = torch.stack((channel[..., j], partner[..., j]), -1).transpose(1, 2)
    right = torch.stack((other[..., j], other[..., _partners(j, attention)]), 2).permute(0, 3, 2, 1)
    return left @ right * attention.scaling


def _softmax_change(attention, w_o, group, heads, delta):
    """‖Σ_h (softmax(S_h − Δ_hj) − softmax(S_h)) V W_O^h‖ for every channel j of one group: (B, d).

    `delta(channels)` returns (B, |channels| · |heads|, n, n). V W_O^h is taken in the coordinates of an
    orthonormal basis of the heads' W_O, so its width is |heads| · d and not D.
    """
    batch, _, n, width = attention.query.shape
    values = _projected_values(attention, w_o, group, heads)
    logits = attention.query[:, heads] @ attention.key[:, group, None].transpose(-1, -2) * attention.scaling
    allowed = attention.allowed[:, :1]
    before = torch.softmax(_masked(logits, allowed), -1) @ values
    step = max(1, CHUNK_BYTES // (batch * len(heads) * n * n * logits.element_size()))
    norms = []
    for j in torch.arange(width, device=logits.device).split(step):
        changed = logits[:, None] - delta(j).unflatten(1, (len(j), len(heads)))
        after = torch.softmax(_masked(changed, allowed[:, None]), -1) @ values[:, None]
        change = (after - before[:, None]).sum(2) * attention.real[:, None, :, None]
        norms.append(change.flatten(2).norm(dim=-1))
    return torch.cat(norms, 1)


def _masked(logits, allowed):
    return logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)


def _projected_values(attention, w_o, group, heads):
    """V W_O^h in an orthonormal basis: (B, |heads|, n, min(D, |heads| · d)), inner products unchanged."""
    width = attention.value.shape[-1]
    stacked = torch.cat([w_o[h * width : (h + 1) * width] for h in heads])
    triangle = torch.linalg.qr(stacked.T).R.T.unflatten(0, (len(heads), width))
    return attention.value[:, group, None] @ triangle


# Names of the importance rules that `measure_importance` knows.
RULES = ("exact",)


class Recorder:
    """Collects the importance of every neuron during forward passes: one dict of (B, layers, channels) a batch.

    Use `recording`, which installs the hooks and removes them.
    """

    def __init__(self, model, rule):
        self.rule = rule
        self.architecture = Architecture(model)
        self.real = None
        self._rotation = {}
        self._layers = {}

    def start(self, real):
        """Begin a batch whose real positions are `real` (B, n)."""
        self.real, self._layers = real.bool(), {}

    def finish(self):
        """Importance per projection of the batch just run: (B, layers, channels), on the CPU."""
        count = len(self.architecture.layers)
        return {p: torch.stack([self._layers[i][p].cpu() for i in range(count)], 1) for p in PROJECTIONS}

    def _keep(self, layer, **scores):
        self._layers.setdefault(layer, {}).update(scores)

    def _weight(self, layer, projection, like):
        return self.architecture.place(layer, projection).weight.to(like.device, like.dtype)

    def before_down(self, layer, module, inputs):
        """Hook on the input of W_down."""
        hidden = widen(inputs[0])
        scores = feed_forward(hidden, self._weight(layer, "down", hidden), self.real.to(hidden.device))
        self._keep(layer, gate=scores, up=scores, down=scores)

    def before_attention(self, layer, module, inputs, named):
        """Hook that remembers the rotary embedding of one attention layer."""
        self._rotation[layer] = [widen(x) for x in named["position_embeddings"]]

    def attend(self, module, query_states, key_states, value_states, attention_mask, scaling, dropout=0.0, **_):
        """Attention with the model's own numbers, measured on the way (an attention interface function)."""
        layer = module.layer_idx
        wide = [widen(x) for x in (query_states, key_states, value_states)]
        cos, sin = self._rotation.pop(layer)
        allowed = attention_mask[..., : key_states.shape[2]] >= 0
        heads = _heads(*wide, allowed, scaling)
        attention = Attention(*wide, heads, allowed, self.real.to(heads.device), scaling, cos, sin)
        w_o = self._weight(layer, "o", heads)
        groups = wide[1].shape[1]
        self._keep(
            layer,
            q=query(attention, w_o),
            k=key(attention, w_o),
            v=value(heads, w_o, attention.real, groups),
            o=output(heads, w_o, attention.real),
        )
        return heads.transpose(1, 2).contiguous().to(query_states.dtype), None


def widen(x):
    """Float32 or wider: norms of half-precision activations are accumulated in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _heads(query_states, key_states, value_states, allowed, scaling):
    """Attention outputs before W_O: (B, H, n, d)."""
    repeat = query_states.shape[1] // key_states.shape[1]
    keys, values = (x.repeat_interleave(repeat, 1) for x in (key_states, value_states))
    logits = query_states @ keys.transpose(-1, -2) * scaling
    return torch.softmax(_masked(logits, allowed), -1) @ values


@contextmanager
def recording(model, rule="exact"):
    """Measure every neuron while `model` runs; the hooks and the attention function are gone on exit.

    Yields
    ------
    Recorder
        Call `start(real)` before and `finish()` after each forward pass.

    Raises
    ------
    UnsupportedArchitecture
        If the model is not in the architecture table.
    """
    recorder = Recorder(model, rule)
    previous = model.config._attn_implementation
    handles = []
    AttentionInterface.register("safetyneuron", recorder.attend)
    AttentionMaskInterface.register("safetyneuron", eager_mask)
    try:
        model.set_attn_implementation("safetyneuron")
        for layer in range(len(recorder.architecture.layers)):
            down = recorder.architecture.place(layer, "down").module
            handles.append(down.register_forward_pre_hook(_bind(recorder.before_down, layer)))
            attention = recorder.architecture.attention(layer)
            handles.append(attention.register_forward_pre_hook(_bind(recorder.before_attention, layer), with_kwargs=True))
        yield recorder
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation(previous)


def _bind(method, layer):
    return lambda *arguments: method(layer, *arguments)
