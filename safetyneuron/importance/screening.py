"""The exact selection without measuring everything exactly: a minimum over prompts is bounded by every one of them.

Equation 3 ranks a neuron by its minimum over prompts, so its exact importance for any prompt is an upper bound. A few
prompts are measured in full; from then on only the rows of q and k are measured whose bound can still reach the
threshold. What is left out is never trusted to a guess: as long as the bounds would select a row whose minimum is not
known, the prompts run again for it.
"""

from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safetyneuron.importance.profile import by_length, check_finite, lower, scored
from safetyneuron.importance.recorder import recording
from safetyneuron.importance.selection import select_fraction
from safetyneuron.neurons.encoding import encode_prompts
from safetyneuron.neurons.sets import NeuronSet

SCOUTS = 16  # one prompt in so many is measured in full, a batch at most
MARGIN = (
    0.5  # rows are given up below this share of the threshold so far, which falls with every prompt
)


def screen(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    fraction: float,
    batch_size: int = 16,
) -> NeuronSet:
    """The neurons that rule `exact` selects at a budget, with `exact` run only on rows of q and k that may be among them.

    Feed-forward, v and o are exact at no cost, and the shortest prompts, whose importance is lowest, bound q and k.
    Proof that the set is that of `exact`: the neurons with the highest bounds are taken once all their bounds are their
    minima; every other neuron has a lower bound, or an equal one and a later place, and so a minimum no higher.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    prompts : list of str
    fraction : float
        Share of all neurons, in (0, 1].
    batch_size : int
        Prompts a forward pass.

    Returns
    -------
    NeuronSet
        The set of `measure_importance(model, tokenizer, prompts).select(fraction=fraction)` (Zhao et al. 2025, Eq 3).

    Raises
    ------
    SafetyNeuronError
        If there are no prompts, one is longer than the context, the share is out of range, or importance is not finite.
    UnsupportedArchitecture
        If the model is not in the architecture table.
    """
    encoded = encode_prompts(model, tokenizer, prompts)
    scouts, rest = _with_scouts(by_length(encoded, 1), batch_size)
    with torch.inference_mode(), recording(model) as recorder:
        run = partial(scored, model, tokenizer, encoded, recorder=recorder)
        bounds = {p: x.amin(0) for _, scores in run([scouts]) for p, x in scores.items()}
        check_finite(bounds, recorder.rule)
        known = {p: torch.full_like(x, not rest, dtype=torch.bool) for p, x in bounds.items()}
        while True:
            chosen = select_fraction(bounds, fraction)
            if all(known[p][mask].all() for p, mask in chosen.masks.items()):
                return chosen
            bounds, measured = _lowered(run(rest), recorder, bounds, known, fraction)
            check_finite(bounds, recorder.rule)
            known = {p: known[p] | measured[p] for p in known}


def _with_scouts(positions, batch_size):
    """The shortest prompts as one batch, and all others in batches. positions: [position] of every prompt, by length."""
    order = [position for (position,) in positions]
    count = min(batch_size, -(-len(order) // SCOUTS))
    scouts, rest = order[:count], order[count:]
    return scouts, [rest[start : start + batch_size] for start in range(0, len(rest), batch_size)]


def _lowered(batches, recorder, bounds, known, fraction):
    """The bounds after all batches, and masks of the neurons that were measured in every one: their bounds are minima."""
    near = {p: ~known[p] & rows for p, rows in _near(bounds, fraction).items()}
    recorder.wanted = _by_group(near, recorder.architecture)
    for _, scores in batches:  # infinite where not wanted
        bounds = lower(bounds, {p: x.amin(0) for p, x in scores.items()})
        near = {p: near[p] & rows for p, rows in _near(bounds, fraction).items()}
        recorder.wanted = _by_group(near, recorder.architecture)
    return bounds, {p: near.get(p, torch.ones_like(known[p])) for p in known}


def _near(bounds, fraction):
    """Rows of q and k whose bound is not far below the threshold of the bounds, which is never below the true one."""
    chosen = select_fraction(bounds, fraction).masks
    threshold = min(float(bounds[p][mask].min()) for p, mask in chosen.items() if mask.any())
    return {p: bounds[p] >= MARGIN * threshold for p in ("q", "k")}


def _by_group(rows, architecture):
    """Masks (layers, G, d) of q, where any head of the group wants a channel, and of k."""
    heads, groups = architecture.heads, architecture.groups
    of_heads = rows["q"].unflatten(1, (groups, heads // groups, -1))
    return of_heads.any(2), rows["k"].unflatten(1, (groups, -1))
