"""Objectives by hand-worked numbers."""

from __future__ import annotations

import pytest
import torch
from parity.tolerances import PLANTED_FACTOR, allowed

from giong.objectives import OBJECTIVES, pretrain, sft


def sft_loss(planted: str | None = None) -> tuple[float, float, list[float]]:
    """Three tokens with log-probabilities -1, -2, -0.5 and weights 1, 0.5, 2.

    Loss sum = 1 * 1 + 0.5 * 2 + 2 * 0.5 = 3; weight sum = 1 + 0.5 + 2 = 3.5; d loss / d logprob = -weight.
    """
    logprobs_N = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    weights_N = torch.tensor([1.0, 0.5, 2.0])
    result = sft.loss({"logprobs_N": logprobs_N, "weights_N": torch.ones(3) if planted == "weights forgotten" else weights_N})
    result.loss_sum.backward()
    return float(result.loss_sum.detach()), float(result.weight_sum), logprobs_N.grad.tolist()


def test_sft_by_hand():
    loss_sum, weight_sum, gradient = sft_loss()
    assert loss_sum == pytest.approx(3.0, abs=allowed("hand_worked"))
    assert weight_sum == pytest.approx(3.5, abs=allowed("hand_worked"))
    assert gradient == pytest.approx([-1.0, -0.5, -2.0], abs=allowed("hand_worked"))


def test_forgotten_weights_are_seen():
    assert abs(sft_loss("weights forgotten")[0] - 3.0) > PLANTED_FACTOR * allowed("hand_worked")


def test_weights_are_detached():
    weights_N = torch.ones(2, requires_grad=True)
    result = sft.loss({"logprobs_N": torch.tensor([-1.0, -1.0], requires_grad=True), "weights_N": weights_N})
    assert not result.weight_sum.requires_grad
    result.loss_sum.backward()
    assert weights_N.grad is None


def test_pretraining_is_the_same_loss_with_other_rows():
    assert pretrain.loss is sft.loss
    assert set(OBJECTIVES) == {"sft", "pretrain"}
    assert set(sft.NEEDS) == {"logprobs_N", "weights_N"}
