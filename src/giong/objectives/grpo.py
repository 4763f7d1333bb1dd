"""Group-relative policy optimisation: answers drawn for one request are judged against each other (Shao et al. 2024, 2402.03300,
equation 3).

One decision a reader may question: the advantages are numbers that come with the rows. Who drew the answers has them all side by
side; here a row needs its own one only, so the answers to a request may lie in different packs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from giong.config import ObjectiveConfig
from giong.contracts import LossSum

NEEDS = ("logprobs_N", "weights_N", "row_of_N", "advantages_R")
"""Also `old_logprobs_N` where answers are used for more than one update, and `reference_logprobs_N` where beta is not 0."""


def loss(tensors: Mapping[str, torch.Tensor], config: ObjectiveConfig) -> LossSum:
    """-sum over answers of the mean over their tokens of min(ratio A, clip(ratio) A) - beta KL; the weight is the number of answers.

    `weights_N` are 1 / length of the answer. The ratio is that of the probabilities now and when the answer was drawn, 1 in the first
    update after that. The KL divergence to the reference is the estimator exp(d) - d - 1 of equation 4, d = log(reference / now).
    Advantages, old and reference log-probabilities are detached. The config's beta must be resolved (not None).
    """
    assert config.beta is not None
    logprobs_N, weights_N = tensors["logprobs_N"], tensors["weights_N"]
    advantages_N = tensors["advantages_R"].detach()[tensors["row_of_N"]]
    ratio_N = (logprobs_N - tensors.get("old_logprobs_N", logprobs_N).detach()).exp()
    clipped_N = ratio_N.clamp(1 - config.clip_epsilon, 1 + config.clip_epsilon)
    gain_N = torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    metrics = {
        "entropy": -(weights_N * logprobs_N.detach()).sum(),
        "clip_share": (weights_N * (clipped_N * advantages_N < ratio_N * advantages_N)).sum().detach(),
    }
    if config.beta and "reference_logprobs_N" in tensors:
        ahead_N = tensors["reference_logprobs_N"].detach() - logprobs_N
        kl_N = ahead_N.exp() - ahead_N - 1
        gain_N = gain_N - config.beta * kl_N
        metrics["kl"] = (weights_N * kl_N).sum().detach()
    return LossSum(-(weights_N * gain_N).sum(), weights_N.sum(), metrics)
