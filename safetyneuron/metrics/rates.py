"""A proportion and its interval."""

from dataclasses import dataclass
from math import sqrt

import numpy as np

Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Rate:
    """`hits` out of `trials`, with a 95 % Wilson interval; a mean over repetitions need not be a whole number of hits.

    >>> Rate(0, 100).percent
    '0.0 [0.0, 3.7]'
    """

    hits: float
    trials: int

    def __post_init__(self):
        if not 0 <= self.hits <= self.trials or self.trials == 0:
            raise ValueError(
                f"a rate needs 0 <= hits <= trials and trials > 0, got {self.hits} of {self.trials}"
            )

    @property
    def value(self):
        """The proportion, 0 to 1."""
        return self.hits / self.trials

    @property
    def interval(self):
        """Lower and upper end of the Wilson score interval (Wilson 1927), 0 to 1."""
        n, p = self.trials, self.value
        middle = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
        half = Z95 / (1 + Z95**2 / n) * sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
        return max(0.0, min(p, middle - half)), min(
            1.0, max(p, middle + half)
        )  # rounding must not exclude p

    @property
    def percent(self):
        """The proportion and its interval as text, in percent."""
        low, high = self.interval
        return f"{100 * self.value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    @classmethod
    def mean(cls, rates):
        """Mean over repetitions that share their prompts, at the fewest trials of any (repetitions add no new prompts)."""
        trials = min(rate.trials for rate in rates)
        return cls(trials * sum(rate.value for rate in rates) / len(rates), trials)


def bootstrap(statistic, count, draws=1000):
    """Ends of the 95 % percentile interval of a statistic over `count` items, resampled with replacement.

    statistic: from indices (draws, count) to one value per draw.
    """
    chosen = np.random.default_rng(0).integers(count, size=(draws, count))
    return tuple(float(end) for end in np.quantile(statistic(chosen), (0.025, 0.975)))
