"""Odds-ratio preference optimisation: learning the chosen answer and turning away from the other at once, without a reference
(Hong, Lee and Thorne 2024, 2403.07691, equations 6 and 7).
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from giong.config import ObjectiveConfig
from giong.contracts import LossSum
from giong.objectives.answers import Tensors, mean_per_row, of_pairs, pair_metrics

NEEDS = ("logprobs_N", "sign_R", "row_of_N", "group_of_R")

SMALLEST = 1e-7
"""An answer of probability 1 would have infinite odds."""


def loss(tensors: Tensors, config: ObjectiveConfig) -> LossSum:
    """The sum over pairs; the weight is their number. The config's beta (the paper's lambda) must be resolved (not None).

    With P the geometric mean of an answer's token probabilities and odds = P / (1 - P), a pair costs
    -log P(chosen) - beta log sigmoid(log(odds(chosen) / odds(rejected))). The first term is the pair's own mean, so that a long answer
    weighs no more than a short one. `log_odds_ratio` is the mean of its logarithm over pairs.
    """
    assert config.beta is not None
    mean_R = mean_per_row(tensors)
    chosen_P, rejected_P = of_pairs(tensors, mean_R)
    ratio_P = _log_odds(chosen_P) - _log_odds(rejected_P)
    losses_P = -chosen_P - config.beta * logsigmoid(ratio_P)
    metrics = pair_metrics(tensors, config.beta * mean_R) | {
        "nll_chosen": -chosen_P.detach().sum(), "log_odds_ratio": ratio_P.detach().sum(),
    }  # fmt: skip
    return LossSum(losses_P.sum(), losses_P.new_tensor(len(losses_P)), metrics)


def _log_odds(logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs - torch.log(-torch.expm1(logprobs.clamp(max=-SMALLEST)))
