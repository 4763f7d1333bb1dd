"""How good labels and values are, and how sure that is: accuracy, F1, AUC, calibration; errors of a regression.

Every figure is a function of weights: with all weights 1 it is the figure itself, with the number of times that each document was drawn
it is the figure on a resample. So figures that are no means of items (F1, AUC, calibration error) get the same paired intervals by
document as those that are.

Axis letters: B resamples, N texts, C labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from giong.sizing.interval import Interval

NUM_BINS = 15
"""Of equal width, for the calibration error: those of Guo et al. 2017, section 4."""
RESAMPLES_AT_ONCE = 200

Figure = Callable[[np.ndarray], np.ndarray]
"""Weights (B, N) to values (B,); NaN where a resample leaves it undefined."""


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, above / below, np.nan)


def _nanmean(values: np.ndarray) -> np.ndarray:
    counts = np.isfinite(values).sum(0)
    return np.where(counts > 0, np.nansum(values, axis=0) / np.maximum(counts, 1), np.nan)


def weighted_mean(values_N: np.ndarray) -> Figure:
    return lambda weights_BN: _ratio(weights_BN @ values_N, weights_BN.sum(1))


def f1(chosen_NC: np.ndarray, targets_NC: np.ndarray, average: str) -> Figure:
    """Van Rijsbergen 1979: 2 TP / (2 TP + FP + FN), over all labels together (`micro`) or the mean over the labels that occur (`macro`)."""
    both, either = chosen_NC * targets_NC, chosen_NC + targets_NC

    def figure(weights_BN: np.ndarray) -> np.ndarray:
        right_BC, counted_BC = 2 * (weights_BN @ both), weights_BN @ either
        if average == "micro":
            return _ratio(right_BC.sum(1), counted_BC.sum(1))
        return _nanmean(_ratio(right_BC, np.where(weights_BN @ targets_NC > 0, counted_BC, 0.0)).T)

    return figure


def auc(scores_N: np.ndarray, targets_N: np.ndarray) -> Figure:
    """The area under the ROC curve: how often a text with the label scores above one without, ties half (Hanley and McNeil 1982)."""
    order = np.argsort(scores_N, kind="stable")
    scores, targets = scores_N[order], targets_N[order]
    starts = np.flatnonzero(np.r_[True, scores[1:] != scores[:-1]])

    def figure(weights_BN: np.ndarray) -> np.ndarray:
        weights = weights_BN[:, order]
        with_label = np.add.reduceat(weights * targets, starts, axis=1)
        without = np.add.reduceat(weights * (1 - targets), starts, axis=1)
        below = np.cumsum(without, axis=1) - without
        return _ratio((with_label * (below + without / 2)).sum(1), with_label.sum(1) * without.sum(1))

    return figure


def calibration_error(confidence_N: np.ndarray, right_N: np.ndarray) -> Figure:
    """Expected calibration error (Guo et al. 2017, 1706.04599, equation 3): |share right - mean confidence| by bin, weighted by size."""
    bins = np.clip(np.ceil(confidence_N * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    gaps = np.zeros((len(confidence_N), NUM_BINS))
    gaps[np.arange(len(bins)), bins] = right_N - confidence_N
    return lambda weights_BN: _ratio(np.abs(weights_BN @ gaps).sum(1), weights_BN.sum(1))


def rank_correlation(values_N: np.ndarray, targets_N: np.ndarray) -> Figure:
    """Spearman's: the correlation of ranks, which are those of all texts."""
    from scipy.stats import rankdata

    x, y = rankdata(values_N), rankdata(targets_N)

    def figure(weights_BN: np.ndarray) -> np.ndarray:
        total = weights_BN.sum(1)
        mean_x, mean_y = weights_BN @ x / total, weights_BN @ y / total
        with np.errstate(invalid="ignore", divide="ignore"):
            covariance = weights_BN @ (x * y) / total - mean_x * mean_y
            return covariance / np.sqrt((weights_BN @ (x * x) / total - mean_x**2) * (weights_BN @ (y * y) / total - mean_y**2))

    return figure


def figures(scores_NC: np.ndarray, targets_NC: np.ndarray, problem: str) -> dict[str, Figure]:
    """The figures of a kind of problem, the one that decides first. `scores_NC` are probabilities, or values (C = 1)."""
    if problem == "regression":
        error_N = scores_NC[:, 0] - targets_NC[:, 0]
        return {
            "mean absolute error": weighted_mean(np.abs(error_N)),
            "root mean squared error": lambda weights_BN: np.sqrt(weighted_mean(error_N**2)(weights_BN)),
            "rank correlation": rank_correlation(scores_NC[:, 0], targets_NC[:, 0]),
        }
    labels = range(targets_NC.shape[1])

    def mean_auc(weights_BN: np.ndarray) -> np.ndarray:
        return _nanmean(np.stack([auc(scores_NC[:, label], targets_NC[:, label])(weights_BN) for label in labels]))

    if problem == "multi_label":
        chosen_NC = (scores_NC > 0.5).astype(float)
        right_NC = (chosen_NC == targets_NC).astype(float)
        confidence_NC = np.where(chosen_NC > 0, scores_NC, 1 - scores_NC)
        return {
            "F1 micro": f1(chosen_NC, targets_NC, "micro"),
            "F1 macro": f1(chosen_NC, targets_NC, "macro"),
            "all labels right": weighted_mean(right_NC.min(1)),
            "AUC": mean_auc,
            "calibration error": lambda weights_BN: np.mean(
                [calibration_error(confidence_NC[:, label], right_NC[:, label])(weights_BN) for label in labels], axis=0
            ),
            "Brier score": weighted_mean(((scores_NC - targets_NC) ** 2).mean(1)),
        }
    chosen_NC = np.eye(targets_NC.shape[1])[scores_NC.argmax(1)]
    right_N = (chosen_NC * targets_NC).sum(1)
    return {
        "accuracy": weighted_mean(right_N),
        "F1 macro": f1(chosen_NC, targets_NC, "macro"),
        "AUC": mean_auc,
        "calibration error": calibration_error(scores_NC.max(1), right_N),
        # Brier 1950: over all labels, between 0 and 2.
        "Brier score": weighted_mean(((scores_NC - targets_NC) ** 2).sum(1)),
    }


LOWER_IS_BETTER = frozenset({"nats per hidden token", "mean absolute error", "root mean squared error", "calibration error", "Brier score"})


def bootstrap_weighted(
    figure: Figure, clusters: Sequence[str], *, num_bootstrap: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """A figure and its percentile interval over resampled clusters (Efron 1979); with a single cluster the items are resampled."""
    names, index = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    if len(names) < 2:
        index = np.arange(len(clusters))
    num_clusters = int(index.max()) + 1
    point = float(figure(np.ones((1, len(index))))[0])
    draws = []
    generator, chances = np.random.default_rng(seed), np.full(num_clusters, 1 / num_clusters)
    for start in range(0, num_bootstrap, RESAMPLES_AT_ONCE):
        drawn = generator.multinomial(num_clusters, chances, size=min(RESAMPLES_AT_ONCE, num_bootstrap - start))
        draws.append(figure(drawn[:, index].astype(float)))
    usable = np.concatenate(draws)
    usable = usable[np.isfinite(usable)]
    tail = (1 - level) / 2
    low, high = np.quantile(usable, [tail, 1 - tail]) if len(usable) else (math.nan, math.nan)
    return Interval(point, float(low), float(high), level)
