"""Arms of a task other than writing, compared on the same test texts: figures with intervals by document, and which arm to use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from giong.evaluation.metrics.classification import LOWER_IS_BETTER, Figure, bootstrap_weighted
from giong.evaluation.results import finite
from giong.sizing.interval import Interval


def compare_arms(
    by_arm: Mapping[str, Mapping[str, Figure]],
    documents: Sequence[str],
    *,
    tuned: str,
    labels: Mapping[str, str],
    num_bootstrap: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Every figure of every arm, and the verdict: "train" where the tuned arm beats the best other one, with an interval above 0.

    The first figure of an arm decides. `documents` names the document of each item that the figures weigh. JSON-able.
    """
    settings = {"num_bootstrap": num_bootstrap, "seed": seed}
    measured = {
        name: {figure: bootstrap_weighted(compute, documents, **settings) for figure, compute in arm.items()}
        for name, arm in by_arm.items()
    }
    deciding = next(iter(by_arm[tuned]))
    sign = -1.0 if deciding in LOWER_IS_BETTER else 1.0
    best = max((name for name in by_arm if name != tuned), key=lambda name: sign * measured[name][deciding].point)
    ours, theirs = by_arm[tuned][deciding], by_arm[best][deciding]
    gain = bootstrap_weighted(lambda weights_BN: sign * (ours(weights_BN) - theirs(weights_BN)), documents, **settings)
    arms = [
        {"name": name, "label": labels.get(name, name), "figures": {figure: interval.to_dict() for figure, interval in arm.items()}}
        for name, arm in measured.items()
    ]
    result = {
        "num_texts": len(documents), "num_documents": len(set(documents)), "arms": arms, "deciding": deciding,
        "gain": gain.to_dict(), "best_baseline": best, "verdict": _verdict(gain, deciding, labels.get(best, best)),
    }  # fmt: skip
    return finite({**result, "table": _table(arms)})


def _verdict(gain: Interval, deciding: str, best: str) -> dict[str, str]:
    size = f"its {deciding} is better by {gain.point:.3f} [{gain.low:.3f}, {gain.high:.3f}]"
    if gain.low > 0:
        return {"decision": "train", "reason": f"The tuned model beats the best baseline ({best}): {size}, and the interval lies above 0."}
    if gain.high < 0:
        return {
            "decision": "baseline",
            "reason": f"The best baseline ({best}) beats the tuned model: {size}, and the interval lies below 0.",
        }
    return {"decision": "baseline", "reason": f"Not proven to beat the best baseline ({best}): {size}, and the interval holds 0."}


def confusion(scores_NC: np.ndarray, targets_NC: np.ndarray) -> list[list[int]]:
    """Texts by true label (rows) and chosen label (columns)."""
    chosen_NC = np.eye(targets_NC.shape[1])[scores_NC.argmax(1)]
    return (targets_NC.T @ chosen_NC).astype(int).tolist()


def _table(arms: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A header and one row of texts per arm, for the terminal and the report."""
    names = list(arms[0]["figures"])
    return [["arm", *names], *([arm["label"], *(_shown(finite(arm["figures"][name])) for name in names)] for arm in arms)]


def _shown(figure: Mapping[str, float | None]) -> str:
    point, low, high = (figure[name] for name in ("point", "low", "high"))
    if point is None:
        return "–"
    return f"{point:.3f}" if low is None or high is None else f"{point:.3f} [{low:.3f}, {high:.3f}]"
