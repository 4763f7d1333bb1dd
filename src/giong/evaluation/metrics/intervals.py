"""How sure a number is: the paired bootstrap over documents, and Wilson's interval for shares.

Everything is resampled by document and in pairs: two draws of test passages differ by more than two arms do, so an
unpaired interval would drown the difference (Miller 2024, 2411.00640).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from giong.sizing.interval import Interval

__all__ = ["Interval", "bootstrap", "bootstrap_draws", "median_interval", "style_gap_closed", "wilson"]

Statistic = Callable[..., np.ndarray]


def bootstrap_draws(
    values: np.ndarray | Sequence[np.ndarray],
    clusters: Sequence[str],
    statistic: Statistic | None = None,
    *,
    num_bootstrap: int = 2000,
    seed: int = 0,
) -> tuple[float, np.ndarray]:
    """The statistic itself and its values on resampled clusters, shape (num_bootstrap,).

    `values` is one array of N items or several paired ones. `statistic` takes their means (numbers or arrays over the
    resamples) and must be vectorised; left out it is the mean of the only array. NaN marks an item without a value: it
    is left out of that array's mean. With a single cluster the items themselves are resampled.
    """  # fmt: skip
    arrays = [np.asarray(array, dtype=float) for array in (values if isinstance(values, (list, tuple)) else [values])]
    names, index = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    if len(names) < 2:
        index = np.arange(len(arrays[0]))
    num_clusters = int(index.max()) + 1
    statistic = statistic or (lambda mean: mean)
    times_drawn = np.random.default_rng(seed).multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), size=num_bootstrap)
    points, draws = [], []
    for array in arrays:
        present = ~np.isnan(array)
        sums = np.bincount(index, weights=np.where(present, array, 0.0), minlength=num_clusters)
        counts = np.bincount(index, weights=present.astype(float), minlength=num_clusters)
        with np.errstate(invalid="ignore", divide="ignore"):
            points.append(sums.sum() / counts.sum())
            draws.append((times_drawn @ sums) / (times_drawn @ counts))
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(statistic(*points)), np.broadcast_to(np.asarray(statistic(*draws), dtype=float), (num_bootstrap,))


def bootstrap(
    values: np.ndarray | Sequence[np.ndarray],
    clusters: Sequence[str],
    statistic: Statistic | None = None,
    *,
    num_bootstrap: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile interval over resampled clusters (Efron 1979); arguments as in `bootstrap_draws`."""  # fmt: skip
    point, draws = bootstrap_draws(values, clusters, statistic, num_bootstrap=num_bootstrap, seed=seed)
    tail = (1 - level) / 2
    usable = draws[~np.isnan(draws)]
    low, high = np.quantile(usable, [tail, 1 - tail]) if len(usable) else (math.nan, math.nan)
    return Interval(point, float(low), float(high), level)


def wilson(num_successes: float, num_trials: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share (Wilson 1927, equation 5); [0, 1] where there was no trial. A tie is half a success."""
    from scipy.special import ndtri

    if num_trials == 0:
        return Interval(math.nan, 0.0, 1.0, level)
    z = float(ndtri(0.5 + level / 2))
    share = num_successes / num_trials
    shrink = 1 + z * z / num_trials
    centre = (share + z * z / (2 * num_trials)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / num_trials + z * z / (4 * num_trials**2))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), level)


def median_interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Interval:
    """A median between two order statistics, whatever the distribution (Conover 1999, section 3.2); its values are independent."""
    from scipy.stats import binom

    ordered = np.sort(np.asarray(values, dtype=float))
    ordered = ordered[~np.isnan(ordered)]
    if not len(ordered):
        return Interval(math.nan, math.nan, math.nan, level)
    rank = max(int(binom.ppf((1 - level) / 2, len(ordered), 0.5)), 1)
    return Interval(float(np.median(ordered)), float(ordered[rank - 1]), float(ordered[len(ordered) - rank]), level)


def style_gap_closed(
    scores_arm: np.ndarray,
    scores_base: np.ndarray,
    scores_author: np.ndarray,
    clusters: Sequence[str],
    *,
    num_bootstrap: int = 2000,
    seed: int = 0,
) -> tuple[Interval | None, str]:
    """(S(arm) - S(base)) / (S(author) - S(base)) with its interval, or (None, reason) where the gap may be nothing.

    The three arrays hold the style scores of the same N requests. 0 is no better than the base, 1 the author's own text.
    """  # fmt: skip
    settings = {"num_bootstrap": num_bootstrap, "seed": seed}
    gap = bootstrap([scores_author, scores_base], clusters, lambda author, base: author - base, **settings)
    if not gap.low > 0:
        return None, (
            f"The base and the author cannot be told apart on these requests (gap {gap}): the style gap closed is not defined, "
            "prompting already matches."
        )
    return bootstrap(
        [scores_arm, scores_base, scores_author], clusters, lambda arm, base, author: (arm - base) / (author - base), **settings
    ), ""  # fmt: skip
