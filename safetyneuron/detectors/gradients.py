"""How much every neuron adds to the refusal log odds, to first order: gradients times activations, all neurons in one backward pass.

The scalar is the log-likelihood of a refusal less that of help (`log_odds.Pair`). What a row puts out, or a column reads,
is its activation a(t); with g(t) the gradient of the log odds there and b a baseline, a neuron contributes Σ_t g(t) (a(t) − b).
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from safetyneuron.errors import SafetyNeuronError
from safetyneuron.memory import Batches
from safetyneuron.metrics.log_odds import batch_likelihoods
from safetyneuron.neurons.architecture import PROJECTIONS, Architecture
from safetyneuron.neurons.hooks import overwriting

STEPS = 8  # points of the path of integrated gradients


@dataclass
class Contributions:
    """What neurons add to the log odds of refusing, over requests: dicts of (layers, channels) per projection.

    mean is signed, a neuron for refusal has a positive one; size is the mean of the absolute values.
    """

    mean: dict
    size: dict


class Probe:
    """Activations inside a graph: `values` are what the model goes on with, `shifts` their distance from a baseline."""

    def __init__(self, baseline, alpha):
        self.baseline, self.alpha, self.values, self.shifts = baseline, alpha, {}, {}

    def read(self, key, activation):
        """Hook: keep the activation, and let it be `alpha` of the way from the baseline to what it is."""
        projection, layer = key
        base = 0 if self.baseline is None else self.baseline[projection][layer].to(activation)
        self.shifts[key] = (activation - base).detach()
        self.values[key] = (
            activation if self.alpha == 1 else base + self.alpha * (activation - base)
        )
        return self.values[key]


@contextmanager
def probing(model, baseline=None, alpha=1.0):
    """Every neuron's activation with its gradient, for the length of a `with` block: a `Probe`."""
    probe, layers = Probe(baseline, alpha), range(len(Architecture(model).layers))
    places = [(p, layer) for layer in layers for p in PROJECTIONS]
    embedded = model.get_input_embeddings().register_forward_hook(
        lambda *x: x[2].detach().requires_grad_()
    )
    try:
        with torch.enable_grad(), overwriting(model, {x: partial(probe.read, x) for x in places}):
            yield probe
    finally:
        embedded.remove()


def odds_and_gradients(model, tokenizer, pairs, probe):
    """Log odds (pairs,) in one pass, and the gradient of their sum at every activation: (2 · pairs, n, channels), refusals first."""
    rows = [(p.prompt, p.refusal) for p in pairs] + [(p.prompt, p.help) for p in pairs]
    refusal, helped = batch_likelihoods(model, tokenizer, rows).chunk(2)
    odds = refusal - helped
    return odds.detach(), dict(
        zip(probe.values, torch.autograd.grad(odds.sum(), list(probe.values.values())))
    )


def contributions(model, tokenizer, pairs, baseline=None, steps=None, batch_size=8):
    """`Contributions` of every neuron to the log odds of refusing.

    Parameters
    ----------
    pairs : list of log_odds.Pair
    baseline : dict of str to torch.Tensor, optional
        (layers, channels) per projection that activations are compared with; zero without it.
    steps : int, optional
        Without it the gradient is taken at the activations; with it, at the middles of so many parts of the straight
        path that all activations go together from the baseline (integrated gradients).
    """
    alphas = [1.0] if steps is None else [(i + 0.5) / steps for i in range(steps)]

    def run(some):
        parts = [added(model, tokenizer, some, baseline, alpha) for alpha in alphas]
        return {key: sum(part[key] for part in parts) / len(parts) for key in parts[0]}

    return summed(pairs, run, batch_size)


def added(model, tokenizer, pairs, baseline=None, alpha=1.0):
    """Σ over tokens and both answers of gradient times shift: (pairs, channels) by (projection, layer)."""
    with probing(model, baseline, alpha) as probe:
        _, gradients = odds_and_gradients(model, tokenizer, pairs, probe)
    totals = {
        key: (g.float() * probe.shifts[key].float()).sum(1).cpu() for key, g in gradients.items()
    }
    return {key: x[: len(pairs)] + x[len(pairs) :] for key, x in totals.items()}


def summed(pairs, run, batch_size):
    """`Contributions` from `run(some pairs)`, which gives (pairs, channels) by (projection, layer)."""
    mean, size = {}, {}
    for _, totals in Batches(batch_size)(pairs, run):
        for key, values in totals.items():
            mean[key] = mean.get(key, 0) + values.double().sum(0)
            size[key] = size.get(key, 0) + values.double().abs().sum(0)
    layers = range(1 + max(layer for _, layer in mean))
    return Contributions(
        *(
            {p: torch.stack([x[p, l] for l in layers]).float() / len(pairs) for p in PROJECTIONS}
            for x in (mean, size)
        )
    )


def plain(case, name):
    """Contributions against zero, on the prompts of a name."""
    return case.once(
        ("contributions", name),
        lambda: contributions(case.model, case.tokenizer, case.pairs(name)),
    )


def signed(case):
    """Gradient × activation (after Molchanov et al. 2019): first-order estimate of what the odds lose when a neuron is zeroed."""
    return plain(case, "harmful").mean


def absolute(case):
    """|Gradient × activation|, request by request."""
    return plain(case, "harmful").size


def contrast(case):
    """Weight × gradient summed over a row or column, signed, harmful − benign.

    Σ_i W_ji ∂L/∂W_ji = Σ_t g_j(t) a_j(t) (with the bias): the same number as gradient × activation.
    """
    harmful, benign = plain(case, "harmful").mean, plain(case, "benign").mean
    return {p: harmful[p] - benign[p] for p in PROJECTIONS}


def attribution(case):
    """Attribution patching (after Nanda 2023; Syed et al. 2023): g · (a − mean of a on harmless requests), summed over tokens."""
    return case.once(
        "attribution",
        lambda: contributions(case.model, case.tokenizer, case.pairs("harmful"), case.means()),
    ).mean


def find_twins(harmful, benign):
    """Harmful pairs with the harmless request of as many tokens that shares most of them, answered alike: list of (Pair, Pair)."""
    found = []
    for pair in harmful:
        alike = [p.prompt for p in benign if len(p.prompt) == len(pair.prompt)]
        if alike:
            shared = [sum(a == b for a, b in zip(pair.prompt, ids)) for ids in alike]
            found.append((pair, replace(pair, prompt=alike[shared.index(max(shared))])))
    return found


def attribution_to_twin(case):
    """Attribution patching (after Nanda 2023) towards a harmless twin: g · (a − a of the twin), token by token.

    Raises
    ------
    SafetyNeuronError
        If no harmless request has as many tokens as a harmful one.
    """
    model, tokenizer = case.model, case.tokenizer
    twins = find_twins(case.pairs("harmful"), case.pairs("benign"))
    if not twins:
        raise SafetyNeuronError(
            "no harmless request has as many tokens as a harmful one: give requests that differ in a word"
        )

    def run(some):
        own, others = zip(*some)
        with probing(model) as probe:
            odds_and_gradients(model, tokenizer, others, probe)
        there = {p: {} for p in PROJECTIONS}
        for (p, layer), values in probe.values.items():
            there[p][layer] = values.detach()
        return added(model, tokenizer, own, there)

    return summed(twins, run, batch_size=8).mean


def integrated(case):
    """Integrated gradients over activations (after Sundararajan et al. 2017), all neurons going together from their mean on harmless requests.

    Over all neurons the scores add up to the log odds less those with every activation at its baseline.
    """
    pairs = case.pairs("harmful")
    return contributions(case.model, case.tokenizer, pairs, case.means(), STEPS).mean
