"""The smallest sets of units that turn refusal into help: by greedy search over end-to-end effects, and along the order of a learned mask."""

from collections.abc import Callable, Sequence

from safetyneuron.detectors.effects import (
    Unit,
    classes_without,
    neurons_of,
    silenced_likelihoods,
)
from safetyneuron.detectors.mask import Row, highest_units, learn_mask
from safetyneuron.metrics.log_odds import Pair
from safetyneuron.neurons.deactivation import deactivate

BROKEN = 0.8  # share of correct help, on harmful and on harmless requests, at which a set breaks refusal and nothing else

Breaks = Callable[[Sequence[Unit]], bool]


def breaks_refusal(model, tokenizer, harmful: Sequence[str], harmless: Sequence[str]) -> Breaks:
    """A function that says whether a model without some units helps correctly, with harm as with all else (`BROKEN`)."""

    def breaks(units):
        return all(
            classes_without(model, tokenizer, prompts, units)["correct"] >= BROKEN
            for prompts in (harmful, harmless)
        )

    return breaks


def greedy_units(
    model,
    tokenizer,
    candidates: Sequence[Unit],
    harmful: Sequence[Pair],
    harmless: Sequence[Pair],
    breaks: Breaks,
    limit: int = 40,
) -> list[Unit] | None:
    """Switch off unit after unit until refusal breaks: each time the one without which correct help gets likeliest.

    What is raised is the mean log-likelihood of the help with harmful requests plus that with harmless ones.

    Returns
    -------
    list of (kind, layer, channel) or None
        In the order of the search; None where `limit` units do not break it.
    """
    chosen: list[Unit] = []
    while not breaks(chosen):
        rest = [unit for unit in candidates if unit not in chosen]
        if len(chosen) == limit or not rest:
            return None
        with deactivate(model, neurons_of(model, chosen)):
            likely = [silenced_likelihoods(model, pairs, rest) for pairs in (harmful, harmless)]
        gain = sum(values[..., 1].mean(1) for values in likely)
        chosen.append(rest[int(gain.argmax())])
    return chosen


def shortest_breaking(order: Sequence[Unit], breaks: Breaks) -> list[Unit] | None:
    """The shortest beginning of an order that breaks, found by doubling and halving; None where not even the whole does."""
    low, high = 0, 1
    while not breaks(order[:high]):
        if high >= len(order):
            return None
        low, high = high, min(2 * high, len(order))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if breaks(order[:middle]) else (middle, high)
    return list(order[:high])


def without_spare(units: Sequence[Unit], breaks: Breaks) -> list[Unit]:
    """What is left of a breaking set when every unit that it can spare is taken out, from the last to the first."""
    needed = list(units)
    for unit in reversed(units):
        fewer = [other for other in needed if other != unit]
        if fewer and breaks(fewer):
            needed = fewer
    return needed


def find_backups(
    model,
    tokenizer,
    raised: Sequence[Row],
    kept: Sequence[Row],
    breaks: Breaks,
    rounds: int = 5,
    updates: int = 200,
    penalty: float = 0.02,
    limit: int = 256,
) -> list[list[Unit]]:
    """Breaking sets that share no unit, found one after the other: how often safety is there again.

    In every round a mask is learned whose gates stay open where an earlier set lies. It ends where no set of `limit` breaks.
    """
    found: list[list[Unit]] = []
    for seed in range(rounds):
        used = neurons_of(model, [unit for units in found for unit in units])
        scores = learn_mask(model, tokenizer, raised, kept, updates, penalty, used, seed)
        units = shortest_breaking(highest_units(scores, limit), breaks)
        if units is None:
            break
        found.append(without_spare(units, breaks))
    return found
