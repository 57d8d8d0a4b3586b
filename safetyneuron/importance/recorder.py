"""One hooked forward pass that measures every neuron: the model's own numbers feed the closed forms."""

from contextlib import contextmanager
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from safetyneuron.importance import exact, paper_and_released
from safetyneuron.importance.first_order import first_order
from safetyneuron.neurons.architecture import FEED_FORWARD, Architecture


class Recorder:
    """Collects the importance of every neuron during forward passes: one dict of (B, layers, channels) a batch.

    Use `recording`, which installs the hooks and removes them.
    """

    def __init__(self, model, rule):
        self.wanted = None  # masks (layers, G, d) of q and k to measure by `exact` as well, as projections `exact q` and `exact k`
        self.architecture = Architecture(model)
        self.rule = rule
        self.real = None
        self._inputs = {}  # (layer, what) -> tensors a hook saw, until attention uses them
        self._constants = {}  # (layer, what) -> what depends on the weights alone
        self._layers = {}
        self._workspace = exact.Workspace()

    def start(self, real):
        """Begin a batch whose real positions are `real` (B, n)."""
        self.real, self._layers = real.bool(), {}

    def finish(self):
        """Importance per projection of the batch just run: (B, layers, channels), on the CPU."""
        count = len(self.architecture.layers)
        return {
            name: torch.stack([self._layers[i][name].cpu() for i in range(count)], 1)
            for name in self._layers[0]
        }

    def _keep(self, layer, scores):
        self._layers.setdefault(layer, {}).update(scores)

    def _weight(self, layer, projection, like):
        return self.architecture.place(layer, projection).weight.to(like.device, like.dtype)

    def before_down(self, layer, module, inputs):
        """Hook on the input of W_down."""
        hidden = widen(inputs[0])
        real = self.real.to(hidden.device)
        if self.rule == "released":
            up = paper_and_released.released_feed_forward(self._inputs.pop((layer, "up")), real)
            self._keep(layer, {"gate": torch.zeros_like(up), "up": up, "down": up})
            return
        scores = exact.feed_forward(
            hidden,
            self._once(layer, "down", lambda: self._weight(layer, "down", hidden).norm(dim=1)),
            real,
        )
        self._keep(layer, dict.fromkeys(FEED_FORWARD, scores))

    def after_up(self, layer, module, inputs, result):
        """Hook on the output of W_up, for the released rule."""
        self._inputs[layer, "up"] = widen(
            result[..., self.architecture.place(layer, "up").channels]
        )

    def before_attention(self, layer, module, inputs, named):
        """Hook that remembers the rotary embedding of one attention layer."""
        self._inputs[layer, "rotation"] = [widen(x) for x in named["position_embeddings"]]

    def before_norm(self, layer, name, module, inputs):
        """Hook on the input of a query or key norm: how much zeroing each channel grows the others."""
        self._inputs[layer, name] = norm_ratio(widen(inputs[0]), norm_epsilon(module)).transpose(
            1, 2
        )

    def attend(
        self,
        module,
        query_states,
        key_states,
        value_states,
        attention_mask,
        scaling,
        dropout=0.0,
        softcap=None,
        **_,
    ):
        """Attention with the model's own numbers, measured on the way (an attention interface function)."""
        layer = module.layer_idx
        wide = [widen(x) for x in (query_states, key_states, value_states)]
        real = self.real.to(wide[0].device)
        allowed = attention_mask[..., : key_states.shape[2]] >= 0
        nothing = ~allowed.any(
            -1, keepdim=True
        )  # rows of padding: they look at themselves, and never count
        allowed = allowed | (
            nothing & torch.eye(allowed.shape[-1], dtype=torch.bool, device=allowed.device)
        )
        heads = attention_output(*wide, allowed, scaling, softcap)
        ratios = [self._inputs.pop((layer, name), None) for name in ("query", "key")]
        rotation = self._inputs.pop((layer, "rotation"))
        attention = exact.Attention(
            *wide, heads, allowed, real, scaling, *rotation, softcap, *ratios
        )
        self._keep(layer, self._attention_scores(layer, attention))
        return heads.transpose(1, 2).contiguous().to(query_states.dtype), None

    def _attention_scores(self, layer, attention):
        if self.rule == "released":
            scores = {
                p: getattr(paper_and_released, f"released_{name}")(attention)
                for p, name in NAMES.items()
            }
            return scores | {"o": torch.zeros_like(scores["q"])}
        factors = self._once(layer, "o", lambda: self._output_factors(layer, attention))
        result = {"o": exact.output(attention.heads, factors, attention.real)}
        if self.rule == "paper":
            return result | {
                p: getattr(paper_and_released, f"paper_{name}")(attention)
                for p, name in NAMES.items()
            }
        if self.rule == "first_order":
            result["q"], result["k"] = first_order(attention, factors)
        if self.rule == "exact":
            result["q"], result["k"] = exact.exact(attention, factors, self._workspace)
        if self.wanted is not None:
            wanted = [mask[layer].to(attention.query.device) for mask in self.wanted]
            result["exact q"], result["exact k"] = exact.exact(
                attention, factors, self._workspace, wanted
            )
        return result | {"v": exact.value(attention.heads, factors, attention.real)}

    def _output_factors(self, layer, attention):
        w_o = self._weight(layer, "o", attention.heads)
        return exact.OutputFactors.of(w_o, attention.groups, attention.repeat)

    def _once(self, layer, what, compute):
        """What depends on the weights alone, computed for the first batch."""
        if (layer, what) not in self._constants:
            self._constants[layer, what] = compute()
        return self._constants[layer, what]


NAMES = {"q": "query", "k": "key", "v": "value"}
# Names of the importance rules that `measure_importance` knows.
RULES = ("exact", "first_order", "paper", "released")


def widen(x):
    """Float32 or wider: norms of half-precision activations are accumulated in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attention_output(query, key, value, allowed, scaling, softcap=None):
    """Heads' outputs before W_O: (B, H, n, d)."""
    if softcap is None:  # the fused kernel never holds the attention maps
        return scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, scale=scaling, enable_gqa=True
        )
    repeat = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(repeat, 1) for x in (key, value))
    logits = exact.capped(query @ keys.transpose(-1, -2) * scaling, softcap)
    return torch.softmax(exact.masked(logits, allowed), -1) @ values


def norm_ratio(x, epsilon):
    """By how much a root-mean-square norm of x (…, d) grows the rest of the vector when channel j is zero: (…, d)."""
    mean = x.square().mean(-1, keepdim=True) + epsilon
    return (mean / (mean - x.square() / x.shape[-1])).sqrt()


def norm_epsilon(module):
    """The epsilon of a root-mean-square norm, under either of its names."""
    return getattr(module, "variance_epsilon", None) or module.eps


@contextmanager
def recording(model, rule="exact", kind=Recorder):
    """Measure every neuron while `model` runs; the hooks and the attention function are gone on exit.

    kind: the class of recorder, for other scores than those of the rules.

    Yields
    ------
    Recorder
        Call `start(real)` before and `finish()` after each forward pass.

    Raises
    ------
    UnsupportedArchitecture
        If the model is not in the architecture table.
    """
    recorder = kind(model, rule)
    previous = model.config._attn_implementation
    AttentionInterface.register("safetyneuron", recorder.attend)
    AttentionMaskInterface.register("safetyneuron", eager_mask)
    handles = []
    try:
        model.set_attn_implementation("safetyneuron")
        for layer in range(len(recorder.architecture.layers)):
            handles += _hooks(recorder, layer)
        yield recorder
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation(previous)


def _hooks(recorder, layer):
    """Install the hooks of one layer and return their handles."""
    place, attention = recorder.architecture.place, recorder.architecture.attention(layer)
    yield place(layer, "down").module.register_forward_pre_hook(
        partial(recorder.before_down, layer)
    )
    yield attention.register_forward_pre_hook(
        partial(recorder.before_attention, layer), with_kwargs=True
    )
    if recorder.rule == "released":
        yield place(layer, "up").module.register_forward_hook(partial(recorder.after_up, layer))
    for name, norm in (("query", "q_norm"), ("key", "k_norm")):
        if hasattr(attention, norm):
            yield getattr(attention, norm).register_forward_pre_hook(
                partial(recorder.before_norm, layer, name)
            )
