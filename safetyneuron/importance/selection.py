"""From scores of neurons to sets of neurons."""

import torch

from safetyneuron.errors import SafetyNeuronError
from safetyneuron.neurons.architecture import PROJECTIONS
from safetyneuron.neurons.sets import NeuronSet


def select_fraction(scores, fraction):
    """The `fraction` of all neurons with the highest scores; ties go to the earlier projection, layer, channel.

    scores: dict of (layers, channels) per projection. At least one neuron is selected.
    """
    if not 0 < fraction <= 1:
        raise SafetyNeuronError(
            f"fraction is {fraction}: it must be in (0, 1], for example 0.01 for one percent"
        )
    flat = torch.cat([scores[p].flatten() for p in PROJECTIONS])
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[: max(1, round(fraction * len(flat)))]] = True
    parts = chosen.split([scores[p].numel() for p in PROJECTIONS])
    return NeuronSet({p: part.view(scores[p].shape) for p, part in zip(PROJECTIONS, parts)})


def select_without_foundation(profile, general, fraction):
    """N_safe without N_foundation, at a given budget (Zhao et al. 2025, §4; Eq 3 for both sets).

    Both sets take the same share of neurons; the share is the smallest one at which the difference holds
    `fraction` of all neurons.

    Parameters
    ----------
    profile, general : ImportanceProfile
        Measured on harmful prompts and on general ones.
    fraction : float
        Size of the result, as a share of all neurons, in (0, 1].

    Raises
    ------
    SafetyNeuronError
        If the profiles are of different models, tokenizers or rules, or too few neurons differ.
    """
    profile.check_like(general)
    return select_difference(profile.minimum, general.minimum, fraction)


def largest_without_foundation(profile, general):
    """The largest share that `select_without_foundation` can fill: a wider detector finds the same neurons in both."""
    profile.check_like(general)
    return largest_difference(profile.minimum, general.minimum)


def largest_difference(scores, others):
    """The largest share that `select_difference` can fill."""
    sizes = _difference_sizes(scores, others)
    return int(sizes.max()) / len(sizes)


def select_difference(scores, others, fraction):
    """What `scores` selects and `others` does not, both at the smallest share at which that is `fraction` of all neurons.

    scores, others: dicts of (layers, channels) per projection.

    Raises
    ------
    SafetyNeuronError
        If too few neurons differ.
    """
    sizes, target = _difference_sizes(scores, others), len(select_fraction(scores, fraction))
    if sizes.max() < target:
        raise SafetyNeuronError(
            f"only {int(sizes.max())} neurons differ between the two sets: choose a fraction below {sizes.max() / len(sizes):.3f}"
        )
    share = (int((sizes >= target).nonzero()[0]) + 1) / len(sizes)
    return select_fraction(scores, share) - select_fraction(others, share)


def _difference_sizes(scores, others):
    """Size of the difference when both take the 1, 2, … highest neurons."""
    first, second = ranks(scores), ranks(others)
    both = torch.bincount(torch.maximum(first, second), minlength=len(first)).cumsum(0)
    return torch.arange(1, len(first) + 1) - both


def ranks(scores):
    """Rank of every neuron, 0 for the highest score, flat in the order of `PROJECTIONS`."""
    order = torch.cat([scores[p].flatten() for p in PROJECTIONS]).argsort(
        descending=True, stable=True
    )
    return torch.empty_like(order).scatter(0, order, torch.arange(len(order)))


def select_per_layer(scores, count):
    """The `count` neurons with the highest scores in every layer of every projection."""
    if count < 1:
        raise SafetyNeuronError(f"per_layer is {count}: it must be at least 1")
    masks = {}
    for projection, score in scores.items():
        top = score.argsort(dim=1, descending=True, stable=True)[:, :count]
        masks[projection] = torch.zeros_like(score, dtype=torch.bool).scatter(1, top, True)
    return NeuronSet(masks)
