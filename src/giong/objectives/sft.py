"""Supervised fine-tuning (instruction tuning): the negative log-likelihood of the answer and its end-of-turn token."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from giong.contracts import LossSum

NEEDS = ("logprobs_N", "weights_N")


def loss(tensors: Mapping[str, torch.Tensor]) -> LossSum:
    """-sum(weights * logprobs) over positions N, in nats. Weights are detached; the sum of weights is returned beside it."""
    weights_N = tensors["weights_N"].detach()
    return LossSum(-(weights_N * tensors["logprobs_N"]).sum(), weights_N.sum())
