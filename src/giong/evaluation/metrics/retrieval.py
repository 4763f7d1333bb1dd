"""How well vectors find what belongs to a text: ranks among all candidates, recall at k, mean reciprocal rank, triplet accuracy.

Axis letters: Q queries, M candidates, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from giong.evaluation.metrics.classification import Figure, weighted_mean

DEPTHS = (1, 5, 10)


def cosines(queries_QD: np.ndarray, candidates_MD: np.ndarray) -> np.ndarray:
    """(Q, M). A vector of zeros is at a right angle to all."""
    lengths = [np.linalg.norm(side, axis=1, keepdims=True) for side in (queries_QD, candidates_MD)]
    queries, candidates = (side / np.where(length > 0, length, 1.0) for side, length in zip((queries_QD, candidates_MD), lengths))
    return queries @ candidates.T


def ranks(similarity_QM: np.ndarray, relevant_Q: Sequence[int]) -> np.ndarray:
    """The place of each query's candidate, from 1; a tie counts against it, so that vectors that are all alike find nothing."""
    own_Q = similarity_QM[np.arange(len(similarity_QM)), np.asarray(relevant_Q)]
    return (similarity_QM >= own_Q[:, None]).sum(1)


def retrieval_figures(rank_Q: np.ndarray, margin_Q: np.ndarray) -> dict[str, Figure]:
    """The figures that decide first. `margin_Q` is how much nearer the positive lies than the nearest own negative, NaN without any."""
    found = {"mean reciprocal rank": weighted_mean(1.0 / rank_Q)}
    found |= {f"recall at {depth}": weighted_mean((rank_Q <= depth).astype(float)) for depth in DEPTHS}
    has_negative = np.isfinite(margin_Q)
    if has_negative.any():
        right_Q = np.where(has_negative, margin_Q > 0, 0).astype(float)

        def triplets(weights_BQ: np.ndarray) -> np.ndarray:
            return weighted_mean(right_Q[has_negative])(weights_BQ[:, has_negative])

        found["triplet accuracy"] = triplets
    return found
