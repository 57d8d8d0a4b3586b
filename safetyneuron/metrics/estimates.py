"""What a table of outcomes says of trainings, requests and random draws that were not seen.

Every number of the book is a mean over an array of outcomes (trainings, draws, items). Its interval
is about *other* trainings, draws and clusters: requests with one verb, or questions about one sum,
succeed and fail together, so they count as one cluster and not as so many independent items. Two
ways of looking at the array overlap: trainings differ (their rows), and clusters differ (their
columns). The variance of a mean with both is V_rows + V_columns - V_cells, where V_cells is the noise
that both hold (two-way clustering, Cameron, Gelbach and Miller 2011); its degrees of freedom are
Satterthwaite's (1946). Where few clusters carry most of the weight, as a handful of attacked requests
among many direct ones, they count as the few that they are. At one training the rows are the random
draws, where there are any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from scipy import stats

from safetyneuron.errors import SafetyNeuronError

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean, difference or ratio, and how far it may be from that of other trainings, draws and requests.

    Attributes
    ----------
    value : float
    error : float
        Standard error.
    freedom : float
        Degrees of freedom of the error.
    trials : int
        Items (requests or questions) of one training.
    trainings, draws, clusters : int
        What the value is a mean over.
    proportion : bool
        Whether the value lies between 0 and 1, and its interval too.
    """

    value: float
    error: float
    freedom: float
    trials: int
    trainings: int = 1
    draws: int = 1
    clusters: int = 1
    proportion: bool = False

    @property
    def interval(self) -> tuple[float, float]:
        """Ends of the 95 % interval: Wilson's with the effective number of items for a proportion, else Student's."""
        if self.proportion:
            return _wilson(self.value, self._effective(), self._quantile())
        half = self._quantile() * self.error
        return self.value - half, self.value + half

    def _quantile(self):
        return float(stats.t.ppf((1 + LEVEL) / 2, self.freedom))

    def _effective(self):
        """Independent items that would give this error; where all outcomes are equal, the items of one training."""
        spread = self.value * (1 - self.value)
        most = self.trials * self.trainings * self.draws
        return min(most, spread / self.error**2) if spread else self.trials

    @property
    def percent(self) -> str:
        """The value and its interval as text, in percent."""
        low, high = self.interval
        return f"{100 * self.value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    def chance_below(self, bound: float) -> float:
        """One-sided p-value against "the truth is at most `bound`"."""
        return float(stats.t.sf((self.value - bound) / self.error, self.freedom))

    def chance_above(self, bound: float) -> float:
        """One-sided p-value against "the truth is at least `bound`"."""
        return float(stats.t.cdf((self.value - bound) / self.error, self.freedom))


def _wilson(p, n, z):
    """Ends of the score interval (Wilson 1927) at n items and quantile z."""
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))


def estimate_mean(
    values: np.ndarray,
    clusters: Sequence | None = None,
    strata: Sequence | None = None,
    proportion: bool = False,
) -> Estimate:
    """Mean of outcomes over trainings, draws and items.

    Parameters
    ----------
    values : array (trainings, draws, items)
        Draws belong to their training; items are the same everywhere.
    clusters : sequence of items, optional
        What an item shares with others (its verb, its sum); each its own where nothing is said.
    strata : sequence of items, optional
        Which set or task an item is of: the mean is then that of the means of the sets.
    proportion : bool
        Whether the outcomes are zeros and ones.

    Raises
    ------
    SafetyNeuronError
        If there are no items, or labels do not fit them.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 3 or 0 in values.shape:
        raise SafetyNeuronError(
            f"outcomes of shape {values.shape}: (trainings, draws, items) are needed, none of them zero"
        )
    count = values.shape[2]
    clusters = _codes(range(count) if clusters is None else clusters, count)
    strata = _codes([0] * count if strata is None else strata, count)
    weights = _weights(strata)
    rows = (
        values.mean(1) if len(values) > 1 else values[0]
    )  # trainings, or the draws of the only one
    mean = round(float((rows.mean(0) * weights).sum()), 12)  # so that all hits are exactly 1
    error, freedom = _two_way(rows, clusters, strata, weights)
    return Estimate(
        mean,
        sqrt(error**2 + _doubt(rows, clusters, strata)),
        freedom,
        count,
        len(values),
        values.shape[1],
        int(clusters.max()) + 1,
        proportion,
    )


def _doubt(rows, clusters, strata):
    """Variance from sets whose clusters are all alike: as if two items of each set might have been otherwise."""
    found = 0.0
    for of in range(strata.max() + 1):
        some = rows[:, strata == of]
        off = [np.bincount(clusters[strata == of], row - some.mean()) for row in some]
        found += 2 / some.shape[1] ** 2 if np.abs(off).max() < 1e-9 else 0.0
    return found / (strata.max() + 1) ** 2


def _weights(strata):
    """What every item weighs in the mean of the means of sets."""
    sizes = np.bincount(strata)
    return 1 / sizes[strata] / len(sizes)


def _codes(labels, count):
    labels = list(labels)
    if len(labels) != count:
        raise SafetyNeuronError(f"{len(labels)} labels for {count} items: give each item one")
    codes = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return np.array([codes[label] for label in labels])


def _two_way(rows, clusters, strata, weights):
    """Standard error of the weighted mean of rows (rows, items), and its degrees of freedom."""
    means = np.array([np.bincount(strata, row) for row in rows]) / np.bincount(strata)
    centre = means.mean(0)
    off = (
        rows - centre[strata]
    ) * weights  # (rows, items), each a share of how far the mean is off
    cells = np.array([np.bincount(clusters, row) for row in off])  # (rows, clusters)
    shares = np.bincount(clusters, weights)
    r, c = len(cells), _count_effective(shares)
    columns, lines = cells.mean(0), cells.sum(1)
    of_columns = c / (c - 1) * (columns**2).sum() if len(shares) > 1 else 0.0
    if r == 1:
        return sqrt(of_columns), max(1, c - 1)
    of_rows = (lines**2).sum() / (r * (r - 1))
    inner = cells - columns - np.outer(lines, shares)
    both = (r / (r - 1)) * (c / max(1, c - 1)) * (inner**2).sum() / r**2
    total = max(of_rows + of_columns - both, min(of_rows, of_columns))
    spread = (
        of_rows**2 / (r - 1) + of_columns**2 / max(1, c - 1) + both**2 / ((r - 1) * max(1, c - 1))
    )
    freedom = total**2 / spread if spread else c - 1
    return sqrt(total), max(min(r, c) - 1, 1, freedom)


def effective_clusters(clusters: Sequence, strata: Sequence) -> float:
    """How many clusters of one size would tell as much as these, which hold unequal shares of the weight (Carter, Schnepel and Steigerwald 2017).

    clusters, strata: as for `estimate_mean`.
    """
    weights = _weights(_codes(strata, len(strata)))
    return _count_effective(np.bincount(_codes(clusters, len(weights)), weights))


def _count_effective(shares):
    squares = shares**2
    return float(squares.sum() ** 2 / (squares**2).sum())


def estimate_ratio(
    above: np.ndarray, below: np.ndarray, clusters: Sequence | None = None
) -> Estimate:
    """Ratio of two means over the same items, its error by the delta method.

    Raises
    ------
    SafetyNeuronError
        If the mean below is zero.
    """
    above, below = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    base = below.mean()
    if not base:
        raise SafetyNeuronError("a ratio to a mean of zero: report the difference instead")
    ratio = float(above.mean() / base)
    part = estimate_mean((above - ratio * below) / base, clusters)
    return Estimate(
        ratio, part.error, part.freedom, part.trials, part.trainings, part.draws, part.clusters
    )


def estimate_exact(values: Sequence[float]) -> Estimate:
    """Mean over trainings of what is known exactly of each, as where a set lies or what two sets share.

    Its interval is about other trainings; that of one training has no width, because the value is about that training.
    """
    values = np.asarray(values, dtype=float)
    count = len(values)
    error = values.std(ddof=1) / sqrt(count) if count > 1 else 0.0
    return Estimate(float(values.mean()), max(float(error), 1e-9), max(1, count - 1), 1, count)


def estimate_pairs(values: Mapping[tuple[int, int], float], spread: float) -> Estimate:
    """Mean over all pairs of trainings, with the jackknife's error over trainings, since pairs with one training in common go together.

    Parameters
    ----------
    values : dict
        From two numbers of trainings to what is known of that pair.
    spread : float
        Standard error of the value where there is a single pair, which says nothing of other trainings.
    """
    trainings = sorted({training for pair in values for training in pair})
    count, mean = len(trainings), float(np.mean(list(values.values())))
    if count < 3:
        return Estimate(mean, max(spread, 1e-9), 1e6, 1, count)
    without = [np.mean([v for pair, v in values.items() if t not in pair]) for t in trainings]
    error = sqrt((count - 1) / count * sum((w - mean) ** 2 for w in without))
    return Estimate(mean, max(error, 1e-9), count - 1, 1, count)


def score_best(options: np.ndarray) -> np.ndarray:
    """Outcomes of the best of several options, chosen on one half of the items and scored on the other, both ways.

    options: (options, items). Returns (items,): their mean is free of the luck of a maximum over noisy options.
    """
    halves, values = np.arange(options.shape[1]) % 2, np.empty(options.shape[1])
    for half in (0, 1):
        best = options[:, halves != half].mean(1).argmax()
        values[halves == half] = options[best, halves == half]
    return values


def rank_among(value: float, controls: Sequence[float]) -> int:
    """Rank of a set among random ones, 1 for the highest; equal ones stand before it."""
    return 1 + sum(control >= value for control in controls)


def chance_of_ranks(ranks: Sequence[int], controls: int) -> float:
    """Probability that ranks among `controls` random sets sum to no more than these, were each set a random one as well.

    ranks: one a training. Exact: the sum of independent uniform ranks 1 … controls + 1.
    """
    single = np.full(controls + 1, 1 / (controls + 1))
    sums = np.array([1.0])
    for _ in ranks:
        sums = np.convolve(sums, single)
    return float(sums[: sum(ranks) - len(ranks) + 1].sum())
