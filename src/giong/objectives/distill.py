"""Distillation: the student comes to expect what a larger teacher expects of every next token (Hinton et al. 2015, 1503.02531, section 2,
whose gradient is equation 2 at temperature 1); on answers that the student draws itself, too (Agarwal et al. 2023, 2306.13649,
algorithm 1).

One decision a reader may question: the temperature is 1. The divergence is over the whole vocabulary, so small shares are heard
without it, and the teacher's distribution is the one that it would answer by.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from giong.config import ObjectiveConfig
from giong.contracts import LossSum

NEEDS = ("logprobs_N", "weights_N", "teacher_kl_N")
"""Also `drawn_N`, 1 where the student drew the answer itself."""


def loss(tensors: Mapping[str, torch.Tensor], config: ObjectiveConfig) -> LossSum:
    """sum(weights * (share KL(teacher || student) - (1 - share) logprobs)) over positions N, in nats; the weight is the sum of weights.

    share is `teacher_share`. Of a drawn token there is no likelihood to raise: there the second part is 0. Weights are detached.
    """
    weights_N = tensors["weights_N"].detach()
    kl = (weights_N * tensors["teacher_kl_N"]).sum()
    written_N = weights_N * (1 - tensors["drawn_N"]) if "drawn_N" in tensors else weights_N
    nll = -(written_N * tensors["logprobs_N"]).sum()
    metrics = {"teacher_kl": kl.detach(), "nll": nll.detach()}
    return LossSum(config.teacher_share * kl + (1 - config.teacher_share) * nll, weights_N.sum(), metrics)
