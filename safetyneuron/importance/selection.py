"""From scores of neurons to sets of neurons."""

import torch

from safetyneuron.errors import SafetyNeuronError
from safetyneuron.neurons.architecture import PROJECTIONS
from safetyneuron.neurons.sets import NeuronSet, Units, unit_kinds


def select_fraction(scores: dict[str, torch.Tensor], fraction: float) -> NeuronSet:
    """The `fraction` of all neurons with the highest scores; ties go to the earlier projection, layer, channel.

    scores: dict of (layers, channels) per projection. At least one neuron is selected.
    """
    return NeuronSet(mark_highest({p: scores[p] for p in PROJECTIONS}, fraction))


def select_units(
    scores: dict[str, torch.Tensor], fraction: float, others: dict[str, torch.Tensor] | None = None
) -> NeuronSet | None:
    """All rows and columns of the `fraction` of functional units with the highest scores, less what `others` selects alike.

    A unit's score is the highest of its rows and columns. Ties go to the earlier kind, layer, channel.

    Parameters
    ----------
    scores, others : dict of str to torch.Tensor
        (layers, channels) per projection. With `others`, both take the smallest share of units at which what `scores`
        selects and `others` does not is `fraction` of all units.
    fraction : float
        Size of the result, as a share of all units of the model, in (0, 1].

    Returns
    -------
    NeuronSet or None
        None where too few units differ.
    """
    scores = unit_scores(scores)
    if others is None:
        return Units(mark_highest(scores, fraction)).neurons()
    others = unit_scores(others)
    if fraction > largest_difference(scores, others):
        return None
    return Units(mark_difference(scores, others, fraction)).neurons()


def unit_scores(scores: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The highest score of every functional unit's rows and columns: (layers, channels) per kind."""
    kinds = unit_kinds({p: score.shape for p, score in scores.items()})
    return {kind: torch.stack([scores[p] for p in kinds[kind]]).amax(0) for kind in kinds}


def mark_highest(scores: dict[str, torch.Tensor], fraction: float) -> dict[str, torch.Tensor]:
    """Boolean masks of the `fraction` of all places with the highest scores, at least one; ties go to the earlier place.

    scores: dict of (layers, channels) per projection or kind of unit.
    """
    if not 0 < fraction <= 1:
        raise SafetyNeuronError(
            f"fraction is {fraction}: it must be in (0, 1], for example 0.01 for one percent"
        )
    flat = _flat(scores)
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[: _budget(flat, fraction)]] = True
    parts = chosen.split([score.numel() for score in scores.values()])
    return {name: part.view(scores[name].shape) for name, part in zip(scores, parts)}


def _flat(scores):
    return torch.cat([score.flatten() for score in scores.values()])


def _budget(places, fraction):
    return max(1, round(fraction * len(places)))


def select_without_foundation(profile, general, fraction: float) -> NeuronSet:
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


def largest_without_foundation(profile, general) -> float:
    """The largest share that `select_without_foundation` can fill: a wider detector finds the same neurons in both."""
    profile.check_like(general)
    return largest_difference(profile.minimum, general.minimum)


def largest_difference(scores: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """The largest share that `select_difference` can fill; of units where the scores are those of units."""
    sizes = _difference_sizes(scores, others)
    return int(sizes.max()) / len(sizes)


def select_difference(
    scores: dict[str, torch.Tensor], others: dict[str, torch.Tensor], fraction: float
) -> NeuronSet:
    """What `scores` selects and `others` does not, both at the smallest share at which that is `fraction` of all neurons.

    scores, others: dicts of (layers, channels) per projection.

    Raises
    ------
    SafetyNeuronError
        If too few neurons differ.
    """
    first, second = ({p: each[p] for p in PROJECTIONS} for each in (scores, others))
    return NeuronSet(mark_difference(first, second, fraction))


def mark_difference(
    scores: dict[str, torch.Tensor], others: dict[str, torch.Tensor], fraction: float
) -> dict[str, torch.Tensor]:
    """`select_difference` as masks, of neurons or of units."""
    sizes = _difference_sizes(scores, others)
    target = _budget(sizes, fraction)
    if sizes.max() < target:
        raise SafetyNeuronError(
            f"only {int(sizes.max())} neurons differ between the two sets: choose a fraction below {sizes.max() / len(sizes):.3f}"
        )
    share = (int((sizes >= target).nonzero()[0]) + 1) / len(sizes)
    first, second = mark_highest(scores, share), mark_highest(others, share)
    return {name: mask & ~second[name] for name, mask in first.items()}


def _difference_sizes(scores, others):
    """Size of the difference when both take the 1, 2, … highest neurons."""
    first, second = ranks(scores), ranks(others)
    both = torch.bincount(torch.maximum(first, second), minlength=len(first)).cumsum(0)
    return torch.arange(1, len(first) + 1) - both


def ranks(scores: dict[str, torch.Tensor]) -> torch.Tensor:
    """Rank of every neuron or unit, 0 for the highest score, flat in the order of the scores."""
    order = _flat(scores).argsort(descending=True, stable=True)
    return torch.empty_like(order).scatter(0, order, torch.arange(len(order)))


def select_per_layer(scores: dict[str, torch.Tensor], count: int) -> NeuronSet:
    """The `count` neurons with the highest scores in every layer of every projection."""
    if count < 1:
        raise SafetyNeuronError(f"per_layer is {count}: it must be at least 1")
    masks = {}
    for projection, score in scores.items():
        top = score.argsort(dim=1, descending=True, stable=True)[:, :count]
        masks[projection] = torch.zeros_like(score, dtype=torch.bool).scatter(1, top, True)
    return NeuronSet(masks)
