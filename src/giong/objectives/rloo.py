"""REINFORCE, leave one out: the baseline of an answer is the mean reward of the others to the same request (Ahmadian et al. 2024,
2402.14740, equation 8).

One decision a reader may question: the KL divergence to the reference is part of the reward, as in the paper, and not of the loss.
It therefore reaches the gradient through the advantages, which whoever draws the answers computes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from giong.config import ObjectiveConfig
from giong.contracts import LossSum

NEEDS = ("logprobs_N", "weights_N", "row_of_N", "advantages_R")


def loss(tensors: Mapping[str, torch.Tensor], config: ObjectiveConfig) -> LossSum:
    """-sum over answers of advantage times the log-probability of the whole answer; the weight is the number of answers.

    `weights_N` are 1 / length of the answer. Advantages are detached.
    """
    logprobs_N, weights_N = tensors["logprobs_N"], tensors["weights_N"]
    advantages_N = tensors["advantages_R"].detach()[tensors["row_of_N"]]
    return LossSum(-(advantages_N * logprobs_N).sum(), weights_N.sum(), {"entropy": -(weights_N * logprobs_N.detach()).sum()})
