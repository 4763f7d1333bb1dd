"""How good a reward model is on held-out pairs: how often it prefers what people preferred, and whether its confidence can be believed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from giong.evaluation.metrics.classification import calibration_error
from giong.evaluation.metrics.intervals import bootstrap


def reward_figures(
    chosen_P: Sequence[float], rejected_P: Sequence[float], requests: Sequence[str], *, num_bootstrap: int, seed: int
) -> dict[str, Any]:
    """Accuracy with its interval by request (ties count half), the expected calibration error of the preference's probability
    sigmoid(|difference|), the mean log-loss in nats, and the mean score of both sides."""
    difference_P = np.asarray(chosen_P, dtype=float) - np.asarray(rejected_P, dtype=float)
    right_P = np.where(difference_P > 0, 1.0, np.where(difference_P == 0, 0.5, 0.0))
    confidence_P = 1 / (1 + np.exp(-np.abs(difference_P)))
    accuracy = bootstrap(right_P, requests, num_bootstrap=num_bootstrap, seed=seed)
    return {
        "num_pairs": len(right_P), "accuracy": accuracy.point, "accuracy_low": accuracy.low, "accuracy_high": accuracy.high,
        "calibration_error": float(calibration_error(confidence_P, right_P)(np.ones((1, len(right_P))))[0]),
        "log_loss": float(np.logaddexp(0, -difference_P).mean()),
        "reward_chosen": float(np.mean(chosen_P)), "reward_rejected": float(np.mean(rejected_P)),
    }  # fmt: skip
