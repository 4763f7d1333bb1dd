"""Kahneman-Tversky optimisation: from single answers that are wanted or not (Ethayarajh et al. 2024, 2402.01306, equation 8).

One decision a reader may question: the reference point depends on all answers of a step, so a step may not be cut into several passes
(`couples_rows`). The alternative, a point for each pass, would let packing change the result.
"""

from __future__ import annotations

import torch

from giong.config import ObjectiveConfig
from giong.contracts import LossSum
from giong.objectives.answers import Tensors, num_tokens, sum_per_row

NEEDS = ("logprobs_N", "reference_logprobs_N", "sign_R", "row_of_N", "group_of_R")


def loss(tensors: Tensors, config: ObjectiveConfig) -> LossSum:
    """The sum over rated answers of w (1 - sigmoid(+-beta (r - z))): + for a wanted answer, - for another; the weight is their number.

    r is log(model / reference) summed over the answer's tokens, w `desirable_weight` or `undesirable_weight`. z, at least 0 and detached,
    estimates the divergence from the reference: the mean r of answers put to requests that they do not belong to (`sign_R` 0), which add
    nothing else. The config's beta must be resolved (not None). Metrics: `rewards_signed`, beta r counted against the label; `accuracy`,
    on the right side of z; `kl`, z in nats; `length` in tokens.
    """
    assert config.beta is not None
    sign_R = tensors["sign_R"]
    ratio_R = sum_per_row(tensors, tensors["logprobs_N"] - tensors["reference_logprobs_N"].detach())
    is_rated_R = sign_R != 0
    others_R = ratio_R.detach()[~is_rated_R]
    point = others_R.mean().clamp_min(0) if len(others_R) else ratio_R.new_zeros(())
    sign_A, ratio_A = sign_R[is_rated_R], ratio_R[is_rated_R]
    weight_A = torch.where(sign_A > 0, config.desirable_weight, config.undesirable_weight)
    losses_A = weight_A * (1 - torch.sigmoid(sign_A * config.beta * (ratio_A - point)))
    found_A = ratio_A.detach()
    metrics = {
        "rewards_signed": (config.beta * sign_A * found_A).sum(), "accuracy": (sign_A * (found_A - point) > 0).sum(),
        "kl": point * len(sign_A), "length": num_tokens(tensors)[is_rated_R].sum(),
    }  # fmt: skip
    return LossSum(losses_A.sum(), losses_A.new_tensor(len(losses_A)), metrics)
