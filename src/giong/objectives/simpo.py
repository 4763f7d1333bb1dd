"""Simple preference optimisation: the mean log-probability of an answer is its reward, so neither reference nor length counts
(Meng, Xia and Chen 2024, 2405.14734, equation 6).
"""

from __future__ import annotations

from torch.nn.functional import logsigmoid

from giong.config import ObjectiveConfig
from giong.contracts import LossSum
from giong.objectives.answers import Tensors, mean_per_row, of_pairs, pair_metrics

NEEDS = ("logprobs_N", "sign_R", "row_of_N", "group_of_R")


def loss(tensors: Tensors, config: ObjectiveConfig) -> LossSum:
    """The sum over pairs of -log sigmoid(beta (mean(chosen) - mean(rejected)) - gamma); the weight is their number.

    Means are of log-probabilities over the answer's tokens; gamma (`simpo_gamma`) is the margin to be won by. The config's beta must
    be resolved (not None).
    """
    assert config.beta is not None
    rewards_R = config.beta * mean_per_row(tensors)
    chosen_P, rejected_P = of_pairs(tensors, rewards_R)
    losses_P = -logsigmoid(chosen_P - rejected_P - config.simpo_gamma)
    return LossSum(losses_P.sum(), losses_P.new_tensor(len(losses_P)), pair_metrics(tensors, rewards_R))
