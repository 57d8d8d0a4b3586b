"""The exact selection without measuring everything exactly: first order discards what cannot be selected."""

from functools import partial

import torch

from safetyneuron.importance.profile import by_length, lower, scored
from safetyneuron.importance.recorder import recording
from safetyneuron.importance.selection import select_fraction
from safetyneuron.neurons.architecture import PROJECTIONS
from safetyneuron.neurons.encoding import encode_prompts

MARGIN = 4.0  # rows that may be selected if exact importance is so many times first order are measured in the first pass
SCOUTS = 16  # one prompt in so many sets the first guess of the threshold


def screen(model, tokenizer, prompts, fraction, batch_size=16):
    """The neurons that rule `exact` selects at a budget, with `exact` run only on rows of q and k that may be among them.

    A few prompts guess the threshold; rows whose first-order importance is below it by a margin are not measured
    exactly. At the end every row left out is held against the final threshold and the largest ratio of exact to first
    order that was seen, and measured after all if it comes near. Feed-forward, v and o are exact at no cost.

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
        The set of `measure_importance(model, tokenizer, prompts).select(fraction=fraction)`.

    Raises
    ------
    SafetyNeuronError
        If there are no prompts, one is longer than the context, or the share is out of range.
    UnsupportedArchitecture
        If the model is not in the architecture table.
    """
    encoded = encode_prompts(model, tokenizer, prompts)
    batches = by_length(encoded, batch_size)
    with torch.inference_mode(), recording(model, "first_order") as recorder:
        lowest = partial(_lowest, model, tokenizer, encoded, recorder)
        first = lowest([sum(batches, [])[::SCOUTS]], None)
        wanted, exact = (
            _near(first, first, MARGIN, fraction),
            {p: torch.full_like(first[p], -torch.inf) for p in ("q", "k")},
        )
        while True:
            first = lowest(batches, wanted)
            exact = {p: torch.where(wanted[p], first[f"exact {p}"], exact[p]) for p in exact}
            scores = {p: exact.get(p, first[p]) for p in PROJECTIONS}
            largest = max(float((exact[p] / first[p]).max()) for p in exact)
            near = _near(scores, first, 1.5 * largest if largest > 0 else MARGIN, fraction)
            wanted = {p: rows & exact[p].isinf() for p, rows in near.items()}
            if not any(rows.any() for rows in wanted.values()):
                return select_fraction(scores, fraction)


def _near(scores, first, ratio, fraction):
    """Rows of q and k that reach the threshold of `scores` if they exceed first order by `ratio`."""
    chosen = select_fraction(scores, fraction).masks
    limit = min(float(scores[p][mask].min()) for p, mask in chosen.items() if mask.any())
    return {p: ratio * first[p] >= limit for p in ("q", "k")}


def _lowest(model, tokenizer, encoded, recorder, batches, wanted):
    """Minimum over prompts of the first-order scores, and under `exact q` and `exact k` of the exact ones of the rows wanted."""
    recorder.wanted, lowest = wanted and _by_group(wanted, model.config), {}
    for _, scores in scored(model, tokenizer, encoded, batches, recorder):
        lowest = lower(lowest, {p: x.amin(0) for p, x in scores.items()})
    return lowest


def _by_group(wanted, config):
    """Masks (layers, G, d) of q, where any head of the group wants a channel, and of k."""
    layers, groups, heads = len(wanted["k"]), config.num_key_value_heads, config.num_attention_heads
    return wanted["q"].view(layers, groups, heads // groups, -1).any(2), wanted["k"].view(
        layers, groups, -1
    )
