"""Direct preference optimisation: the model is its own reward model (Rafailov et al. 2023, 2305.18290, equation 7).

One decision a reader may question: what the reference says is a number for each token, computed once before the first step, and
no second model. It never changes, so computing it again in each step would buy nothing.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from giong.config import ObjectiveConfig
from giong.contracts import LossSum
from giong.objectives.answers import Tensors, num_tokens, of_pairs, pair_metrics, sum_per_row

NEEDS = ("logprobs_N", "reference_logprobs_N", "sign_R", "row_of_N", "group_of_R")


def loss(tensors: Tensors, config: ObjectiveConfig) -> LossSum:
    """The sum over pairs; the weight is their number. The reference is detached; the config's beta must be resolved (not None).

    With log-ratios h of the two answers (log pi/pi_ref of the chosen one minus that of the rejected one), label smoothing e and b
    for beta:

    - `sigmoid`: -(1 - e) log sigmoid(b h) - e log sigmoid(-b h). Equation 7 for e = 0; conservative DPO otherwise (Mitchell 2023,
      "A note on DPO with noisy preferences and relationship to IPO").
    - `ipo`: (h - 1 / (2 b))^2 (Azar et al. 2023, 2310.12036, equation 17), where the log-probability of an answer is the mean over its
      tokens and not the sum, or the target would mean another thing for each length.

    `length_alpha` below 1 counts the tokens beyond the length of the pair's shorter answer only so much, in model and reference alike
    (LD-DPO, Liu et al. 2024, 2409.06411).
    """
    assert config.beta is not None
    beta = config.beta
    ratios_N = tensors["logprobs_N"] - tensors["reference_logprobs_N"].detach()
    ratio_R = sum_per_row(tensors, ratios_N * length_weights(tensors, config.length_alpha))
    if config.dpo_loss == "ipo":
        ratio_R = ratio_R / num_tokens(tensors)
    chosen_P, rejected_P = of_pairs(tensors, ratio_R)
    margin_P = chosen_P - rejected_P
    if config.dpo_loss == "ipo":
        losses_P = (margin_P - 1 / (2 * beta)) ** 2
    else:
        smoothing = config.label_smoothing
        losses_P = -(1 - smoothing) * logsigmoid(beta * margin_P) - smoothing * logsigmoid(-beta * margin_P)
    return LossSum(losses_P.sum(), losses_P.new_tensor(len(losses_P)), pair_metrics(tensors, beta * ratio_R))


def length_weights(tensors: Tensors, alpha: float) -> torch.Tensor:
    """(N,): 1 for the tokens that an answer's counterpart has too by their place, `alpha` for those behind."""
    row_of_N, length_R = tensors["row_of_N"], num_tokens(tensors)
    chosen_P, rejected_P = of_pairs(tensors, length_R)
    shorter_R = torch.minimum(chosen_P, rejected_P)[tensors["group_of_R"]]
    start_R = length_R.cumsum(0) - length_R
    place_N = torch.arange(len(row_of_N), device=row_of_N.device) - start_R[row_of_N]
    return torch.where(place_N < shorter_R[row_of_N], 1.0, alpha)
