"""One hooked forward pass that measures every neuron: the model's own numbers feed the closed forms."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from safetyneuron.importance import exact, paper_and_released
from safetyneuron.importance.attending import attending
from safetyneuron.importance.first_order import first_order
from safetyneuron.neurons.architecture import FEED_FORWARD, Architecture


class Recorder:
    """Collects the importance of every neuron during forward passes: one dict of (B, layers, channels) a batch.

    Use `recording`, which installs the hooks and removes them.
    """

    def __init__(self, model, rule):
        self.wanted = None  # masks (layers, G, d) of the rows of q and k that `exact` measures; all without them
        self.architecture = Architecture(model)
        self.rule = rule
        self.real = None  # between `finish` and the next `start`: the hooks do nothing then
        self._inputs = {}  # (layer, what) -> tensors a hook saw, until attention uses them
        self._constants = {}  # (layer, what) -> what depends on the weights alone
        self._layers = {}
        self.workspace = exact.Workspace()

    def start(self, real: torch.Tensor) -> None:
        """Begin a batch whose real positions are `real` (B, n)."""
        self.real, self._layers, self._inputs = real.bool(), {}, {}

    def finish(self) -> dict[str, torch.Tensor]:
        """Importance per projection of the batch just run: (B, layers, channels), on the CPU."""
        self.real, count = None, len(self.architecture.layers)
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
        wide = [widen(x) for x in (query_states, key_states, value_states)]
        allowed = visible(attention_mask[..., : key_states.shape[2]])
        heads = attention_output(*wide, allowed, scaling, softcap)
        if self.real is not None:
            self._measure(module.layer_idx, *wide, heads, allowed, scaling, softcap)
        return heads.transpose(1, 2).contiguous().to(query_states.dtype), None

    def _measure(self, layer, query, key, value, heads, allowed, scaling, softcap):
        ratios = [self._inputs.pop((layer, name), None) for name in ("query", "key")]
        rotation, real = self._inputs.pop((layer, "rotation")), self.real.to(query.device)
        attention = exact.Attention(
            query, key, value, heads, allowed, real, scaling, *rotation, softcap, *ratios
        )
        self._keep(layer, self._attention_scores(layer, attention))

    def _attention_scores(self, layer, attention):
        return RULES[self.rule](self, layer, attention)

    def wanted_in(
        self, layer: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The masks (G, d) of one layer, if there are any."""
        return self.wanted and tuple(mask[layer].to(device) for mask in self.wanted)

    def output_factors(self, layer: int, attention: exact.Attention) -> exact.OutputFactors:
        """What the rules need of W_O."""

        def factor():
            w_o = self._weight(layer, "o", attention.heads)
            return exact.OutputFactors.of(w_o, attention.groups, attention.repeat)

        return self._once(layer, "o", factor)

    def _once(self, layer, what, compute):
        """What depends on the weights alone, computed for the first batch."""
        if (layer, what) not in self._constants:
            self._constants[layer, what] = compute()
        return self._constants[layer, what]


def exact_scores(
    recorder: Recorder, layer: int, attention: exact.Attention
) -> dict[str, torch.Tensor]:
    """All in the unit of the residual stream; q and k exactly."""
    factors = recorder.output_factors(layer, attention)
    wanted = recorder.wanted_in(layer, attention.query.device)
    return _output_and_value(
        attention, factors, exact.exact(attention, factors, recorder.workspace, wanted)
    )


def first_order_scores(
    recorder: Recorder, layer: int, attention: exact.Attention
) -> dict[str, torch.Tensor]:
    """The same with q and k to first order."""
    factors = recorder.output_factors(layer, attention)
    return _output_and_value(attention, factors, first_order(attention, factors))


def _output_and_value(attention, factors, query_and_key):
    q, k = query_and_key
    v, o = (
        score(attention.heads, factors, attention.real) for score in (exact.value, exact.output)
    )
    return {"q": q, "k": k, "v": v, "o": o}


def paper_scores(
    recorder: Recorder, layer: int, attention: exact.Attention
) -> dict[str, torch.Tensor]:
    """The paper's formulas as printed."""
    factors = recorder.output_factors(layer, attention)
    o = exact.output(attention.heads, factors, attention.real)
    return paper_and_released.paper(attention) | {"o": o}


def released_scores(
    recorder: Recorder, layer: int, attention: exact.Attention
) -> dict[str, torch.Tensor]:
    """The released code's scores; those of o are dropped by its detection."""
    scores = paper_and_released.released(attention)
    return scores | {"o": torch.zeros_like(scores["q"])}


# The importance rules that `measure_importance` knows: name -> scores (B, channels) of q, k, v and o from one attention layer.
RULES = {
    "exact": exact_scores,
    "first_order": first_order_scores,
    "paper": paper_scores,
    "released": released_scores,
}


def widen(x: torch.Tensor) -> torch.Tensor:
    """Float32 or wider: norms of half-precision activations are accumulated in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def visible(mask: torch.Tensor) -> torch.Tensor:
    """Where a position may look, from an additive mask; a row of padding looks at itself, and never counts."""
    allowed = mask >= 0
    itself = torch.eye(allowed.shape[-1], dtype=torch.bool, device=allowed.device)
    return allowed | (~allowed.any(-1, keepdim=True) & itself)


def attention_output(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Heads' outputs before W_O: (B, H, n, d)."""
    if softcap is None:  # the fused kernel never holds the attention maps
        return scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, scale=scaling, enable_gqa=True
        )
    repeat = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(repeat, 1) for x in (key, value))
    logits = exact.capped(query @ keys.transpose(-1, -2) * scaling, softcap)
    return torch.softmax(exact.masked(logits, allowed), -1) @ values


def norm_ratio(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """By how much a root-mean-square norm of x (…, d) grows the rest of the vector when channel j is zero: (…, d)."""
    mean = x.square().mean(-1, keepdim=True) + epsilon
    return (mean / (mean - x.square() / x.shape[-1])).sqrt()


def norm_epsilon(module: nn.Module) -> float:
    """The epsilon of a root-mean-square norm, under either of its names."""
    return getattr(module, "variance_epsilon", None) or module.eps


@contextmanager
def recording(
    model: PreTrainedModel, rule: str = "exact", kind: type[Recorder] = Recorder
) -> Iterator[Recorder]:
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
    with ExitStack() as stack:
        stack.enter_context(attending(model, recorder.attend))
        for layer in range(len(recorder.architecture.layers)):
            for handle in _hooks(recorder, layer):
                stack.callback(handle.remove)
        yield recorder


def _hooks(recorder, layer):
    """Install the hooks of one layer and return their handles."""
    place, attention = recorder.architecture.place, recorder.architecture.attention(layer)

    def hook(method, *first):
        return lambda *args: method(*first, *args) if recorder.real is not None else None

    yield place(layer, "down").module.register_forward_pre_hook(hook(recorder.before_down, layer))
    yield attention.register_forward_pre_hook(
        hook(recorder.before_attention, layer), with_kwargs=True
    )
    if recorder.rule == "released":
        yield place(layer, "up").module.register_forward_hook(hook(recorder.after_up, layer))
    for name, norm in (("query", "q_norm"), ("key", "k_norm")):
        if hasattr(attention, norm):
            yield getattr(attention, norm).register_forward_pre_hook(
                hook(recorder.before_norm, layer, name)
            )
