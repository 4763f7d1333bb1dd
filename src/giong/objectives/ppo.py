"""Proximal policy optimisation: tokens that turned out better than a learnt value expected become likelier, but not by much at a time
(Schulman et al. 2017, 1707.06347, equations 7 and 9).

One decision a reader may question: the value's error is clipped as the policy is, which the paper does not have and its authors' code
does: a value moves by at most `value_clip` per draw, unless that takes it away from the return.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from giong.config import ObjectiveConfig
from giong.contracts import LossSum

NEEDS = ("logprobs_N", "weights_N", "values_N", "advantages_N", "returns_N", "old_logprobs_N", "old_values_N")


def loss(tensors: Mapping[str, torch.Tensor], config: ObjectiveConfig) -> LossSum:
    """sum(weights * (-min(ratio A, clip(ratio) A) + c max((V - R)^2, (clip(V) - R)^2) / 2)) over tokens; the weight is their sum.

    A are the advantages, R the returns, c is `value_weight`; ratio and clips are against what was computed when the answer was drawn.
    All but `logprobs_N` and `values_N` are detached.
    """
    logprobs_N, values_N = tensors["logprobs_N"], tensors["values_N"]
    weights_N, advantages_N, returns_N, old_N, old_values_N = (
        tensors[name].detach() for name in ("weights_N", "advantages_N", "returns_N", "old_logprobs_N", "old_values_N")
    )
    ratio_N = (logprobs_N - old_N).exp()
    clipped_N = ratio_N.clamp(1 - config.clip_epsilon, 1 + config.clip_epsilon)
    gain_N = torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    near_N = old_values_N + (values_N - old_values_N).clamp(-config.value_clip, config.value_clip)
    error_N = torch.maximum((values_N - returns_N) ** 2, (near_N - returns_N) ** 2) / 2
    metrics = {
        "value_loss": (weights_N * error_N).sum().detach(),
        "entropy": -(weights_N * logprobs_N.detach()).sum(),
        "clip_share": (weights_N * (clipped_N * advantages_N < ratio_N * advantages_N)).sum().detach(),
    }
    return LossSum((weights_N * (config.value_weight * error_N - gain_N)).sum(), weights_N.sum(), metrics)
