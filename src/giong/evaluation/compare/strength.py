"""Strengths of several arms from pairwise votes: P(i beats j) = sigmoid(theta_i - theta_j) (Bradley and Terry 1952, equation 1).

Ties count half a win for each. A small ridge keeps the strength of an arm that won or lost every time finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from giong.evaluation.compare.votes import Vote
from giong.evaluation.metrics.intervals import Interval

RIDGE = 0.01
MIN_VOTES = 20
"""Of fewer votes nothing is printed: resampling a handful of them makes an interval that is too narrow."""
MAX_STEP, TOLERANCE, MAX_ITERATIONS = 2.0, 1e-9, 100


@dataclass(frozen=True, slots=True)
class Strength:
    """`theta` in log-odds, mean 0 over the arms; `win_probability` is the chance to win against one of the others, each as likely."""

    arm: str
    theta: float
    win_probability: Interval


def bradley_terry(wins: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """Strengths (..., K) that maximise the likelihood of `wins` (..., K, K), where [i, j] counts i over j, less ridge/2 theta^2.

    Newton's method; the steps are cut short, because the likelihood is flat far out.
    """
    num_arms = wins.shape[-1]
    games = wins + np.swapaxes(wins, -1, -2)
    theta = np.zeros(wins.shape[:-1])
    for _ in range(MAX_ITERATIONS):
        expected = 1 / (1 + np.exp(theta[..., None, :] - theta[..., :, None]))
        gradient = (wins - games * expected).sum(-1) - ridge * theta
        weight = games * expected * (1 - expected)
        hessian = np.eye(num_arms) * (weight.sum(-1) + ridge)[..., None] - weight
        step = np.clip(np.linalg.solve(hessian, gradient[..., None])[..., 0], -MAX_STEP, MAX_STEP)
        theta = theta + step
        if np.abs(step).max() < TOLERANCE:
            break
    return theta - theta.mean(-1, keepdims=True)


def strengths(votes: Sequence[Vote], order: Sequence[str], *, num_bootstrap: int, seed: int) -> list[Strength]:
    """The arms of these votes, strongest first, with 95 % intervals over resampled documents (requests, where there is one document).

    Empty for fewer than three arms (the win rate says it all) or 20 votes, and where the votes do not link all of them.
    """
    from scipy.sparse.csgraph import connected_components

    arms = [arm for arm in order if any(arm in vote.arms for vote in votes)]
    if len(arms) < 3 or len(votes) < MIN_VOTES:
        return []
    clusters = [vote.document_id for vote in votes]
    if len(set(clusters)) < 2:
        clusters = [vote.request_id for vote in votes]
    documents = sorted(set(clusters))
    wins = np.zeros((len(documents), len(arms), len(arms)))
    for vote, cluster in zip(votes, map(documents.index, clusters)):
        left, right = arms.index(vote.left), arms.index(vote.right)
        share = {"left": 1.0, "right": 0.0, "tie": 0.5}[vote.choice]
        wins[cluster, left, right] += share
        wins[cluster, right, left] += 1 - share
    if connected_components(wins.sum(0) + wins.sum(0).T, directed=False)[0] > 1:
        return []
    num = len(documents)
    times_drawn = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), size=num_bootstrap)
    theta, draws = bradley_terry(wins.sum(0)), bradley_terry(np.einsum("bd,dij->bij", times_drawn, wins))
    points, ends = _win_probabilities(theta), np.quantile(_win_probabilities(draws), [0.025, 0.975], axis=0)
    found = [Strength(arm, theta[i], Interval(points[i], ends[0, i], ends[1, i])) for i, arm in enumerate(arms)]
    return sorted(found, key=lambda strength: -strength.theta)


def _win_probabilities(theta: np.ndarray) -> np.ndarray:
    beats = 1 / (1 + np.exp(theta[..., None, :] - theta[..., :, None]))
    return (beats.sum(-1) - 0.5) / (theta.shape[-1] - 1)
