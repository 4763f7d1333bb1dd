"""How good the best of several trials really is, when it was chosen on the same documents that it is measured on.

The best of N is optimistic: part of its lead is luck on these documents. The choice itself is bootstrapped (BBC-CV, Tsamardinos,
Greasidou and Borboudakis 2018, Machine Learning 107, algorithm 3): choose on a resample of the documents, measure the chosen
one on the documents that the resample left out. Nothing is trained again, and no document is lost to the choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from giong.evaluation.metrics.intervals import Interval


@dataclass(frozen=True, slots=True)
class BestOf:
    """The best of several trials. Losses are per unit of weight; smaller is better.

    `gain` is the reference's loss minus the winner's, as measured; `optimism` what of it is expected to be luck of the choice
    (NaN where it cannot be estimated); `corrected_gain` is the gain without it. `num_documents` counts what was resampled.
    """

    winner: int
    value: Interval
    gain: Interval
    optimism: float
    corrected_gain: Interval
    num_documents: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "winner": self.winner, "value": self.value.to_dict(), "gain": self.gain.to_dict(), "optimism": self.optimism,
            "corrected_gain": self.corrected_gain.to_dict(), "num_documents": self.num_documents,
        }  # fmt: skip


def best_of(
    losses_TN: np.ndarray,
    weights_N: np.ndarray,
    documents: Sequence[str],
    reference: int | None = None,
    *,
    num_bootstrap: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> BestOf:
    """Choose among T trials measured on the same N items of several documents, and say how optimistic that is.

    `losses_TN` are sums (nats of an answer), `weights_N` what they are divided by (its tokens). Gains are over trial
    `reference`, or over the mean of all trials for None. Intervals are percentiles over resampled documents (over the
    items where there is one document); the corrected one is shifted by the optimism and not widened for its own noise.
    """  # fmt: skip
    losses_TD, weights_D = _per_document(np.asarray(losses_TN, dtype=float), np.asarray(weights_N, dtype=float), documents)
    num_trials, num_documents = losses_TD.shape
    values_T = losses_TD.sum(axis=1) / weights_D.sum()
    winner = int(np.argmin(values_T))

    def against(values: np.ndarray, chosen: np.ndarray | int) -> np.ndarray:
        """Gain of the chosen trial, for values of shape (..., T)."""
        known = values.mean(axis=-1) if reference is None else values[..., reference]
        picked = values[..., chosen] if isinstance(chosen, int) else np.take_along_axis(values, chosen[:, None], axis=1)[:, 0]
        return known - picked

    shares = np.full(num_documents, 1 / num_documents)
    drawn_BD = np.random.default_rng(seed).multinomial(num_documents, shares, size=num_bootstrap)
    inside_BT = drawn_BD @ losses_TD.T / (drawn_BD @ weights_D)[:, None]
    # Resamples that hold every document leave nothing to measure on.
    left_out_BD = (drawn_BD == 0)[(drawn_BD == 0).any(axis=1)].astype(float)
    chosen_B = inside_BT[(drawn_BD == 0).any(axis=1)].argmin(axis=1)
    gain = float(against(values_T, winner))
    optimism = 0.0 if num_trials == 1 else math.nan
    if num_trials > 1 and len(left_out_BD):
        outside_BT = left_out_BD @ losses_TD.T / (left_out_BD @ weights_D)[:, None]
        # Against the reference on the same documents: how hard those are cancels out.
        optimism = max(0.0, gain - float(against(outside_BT, chosen_B).mean()))
    tail = (1 - level) / 2

    def interval(point: float, draws: np.ndarray, shift: float = 0.0) -> Interval:
        low, high = np.quantile(draws, [tail, 1 - tail])
        return Interval(point - shift, float(low) - shift, float(high) - shift, level)

    gains_B = against(inside_BT, winner)
    return BestOf(
        winner, interval(float(values_T[winner]), inside_BT[:, winner]), interval(gain, gains_B), optimism,
        interval(gain, gains_B, optimism), num_documents,
    )  # fmt: skip


def _per_document(losses_TN: np.ndarray, weights_N: np.ndarray, documents: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    names, index = np.unique(np.asarray(documents, dtype=object).astype(str), return_inverse=True)
    if len(names) < 2:
        return losses_TN, weights_N
    member_ND = np.eye(len(names))[index]
    return losses_TN @ member_ND, weights_N @ member_ND
