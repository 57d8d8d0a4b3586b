"""Rules made of importance: over harmful prompts alone, against other prompts, and over languages."""

import torch

from safetyneuron.importance.selection import ranks
from safetyneuron.neurons.architecture import PROJECTIONS


def eq_3(case, rule):
    """Minimum of importance over harmful prompts (Zhao et al. 2025, Eq 3: above ε for all of them)."""
    return case.importance(rule, "harmful").minimum


def without_foundation(case, rule):
    """Eq 3 less what it selects on general prompts (Zhao et al. 2025, §4)."""
    return eq_3(case, rule), case.importance(rule, "general").minimum


def difference(case, rule):
    """Mean importance on harmful less that on harmless requests."""
    harmful, benign = (case.importance(rule, name).mean for name in ("harmful", "benign"))
    return {p: harmful[p] - benign[p] for p in PROJECTIONS}


def on_benign(case):
    """Mean exact importance on harmless requests: a control that has seen no harm."""
    return case.importance("exact", "benign").mean


def shared(case):
    """Cross-lingual shared safety neurons (after Zhang et al. 2026): in every language among the most important on harmful requests and not on harmless ones.

    At a budget of p %, the intersection over languages of {top p % of mean importance on harmful} \\ {top p % on harmless}:
    scores are the worst rank on harmful requests in any language, those left out the best rank on harmless ones.
    """
    spoken = (None, *(case.languages or ()))
    harmful, benign = (
        torch.stack([ranks(case.importance("exact", name, language).mean) for language in spoken])
        for name in ("harmful", "benign")
    )
    like = case.importance("exact", "harmful").mean
    return unflatten(-harmful.amax(0), like), unflatten(-benign.amin(0), like)


def unflatten(flat, like):
    """One number a neuron or unit, in the order of `ranks`, as dict of (layers, channels)."""
    parts = flat.float().split([x.numel() for x in like.values()])
    return {name: part.view_as(x) for (name, x), part in zip(like.items(), parts)}
