"""A reward model from pairs: the probability that an answer is preferred is the sigmoid of the difference of two scores
(Bradley and Terry 1952; for language models Ouyang et al. 2022, 2203.02155, equation 1).
"""

from __future__ import annotations

from torch.nn.functional import logsigmoid

from giong.config import ObjectiveConfig
from giong.contracts import LossSum
from giong.objectives.answers import Tensors, of_pairs, reward_metrics

NEEDS = ("outputs_RC", "sign_R", "margin_R", "group_of_R")


def loss(tensors: Tensors, config: ObjectiveConfig) -> LossSum:
    """The sum over pairs of -log sigmoid(r(chosen) - r(rejected) - m) + c (r(chosen) + r(rejected))^2; the weight is their number.

    r is the single output of the head (C = 1); m the pair's own margin, 0 where its row names none (Llama 2, Touvron et al. 2023,
    2307.09288, equation 2); c is `center_rewards`, which keeps scores around 0, where the difference alone would leave them anywhere
    (Eisenstein et al. 2023, 2312.09244).
    """
    rewards_R = tensors["outputs_RC"][:, 0]
    chosen_P, rejected_P = of_pairs(tensors, rewards_R)
    margin_P, _ = of_pairs(tensors, tensors["margin_R"].detach())
    losses_P = -logsigmoid(chosen_P - rejected_P - margin_P) + config.center_rewards * (chosen_P + rejected_P) ** 2
    return LossSum(losses_P.sum(), losses_P.new_tensor(len(losses_P)), reward_metrics(tensors, rewards_R))
