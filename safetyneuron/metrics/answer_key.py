"""How well scores of units rank what units do end to end."""

import numpy as np
import pandas as pd


def compare_with_effects(
    scores: np.ndarray, support: np.ndarray, share: float = 0.01
) -> dict[str, float]:
    """How scores agree with what units do end to end.

    Parameters
    ----------
    scores, support : numpy.ndarray
        (units,); support: how much less a model refuses without the unit.
    share : float
        Of the units, which are called the top.

    Returns
    -------
    dict of str to float
        `spearman` with the support, `spearman_size` with its size whatever its sign, and `recall`: share of the top
        in support that is in the top of the scores.
    """
    count = max(1, round(share * len(scores)))
    first, best = (set(np.argsort(-v, kind="stable")[:count].tolist()) for v in (scores, support))
    series = pd.Series(scores)
    return {
        "spearman": float(series.corr(pd.Series(support), "spearman")),
        "spearman_size": float(series.corr(pd.Series(np.abs(support)), "spearman")),
        "recall": len(first & best) / count,
    }
