"""Objectives by hand-worked numbers."""

from __future__ import annotations

import pytest
import torch
from parity.tolerances import PLANTED_FACTOR, allowed

from giong.objectives import OBJECTIVES, classify, pretrain, sft


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
    assert set(OBJECTIVES) >= {"sft", "pretrain"}
    assert set(sft.NEEDS) == {"logprobs_N", "weights_N"}


# Two rows of three classes. Softmax of (ln 1, ln 2, ln 1) is (1/4, 1/2, 1/4), of (ln 3, ln 1, ln 4) it is (3/8, 1/8, 1/2).
LOGITS = [[0.0, 0.6931472, 0.0], [1.0986123, 0.0, 1.3862944]]
TARGETS = [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
BY_HAND = {
    # ln 2 + ln(8/3); the first row is right.
    "single_label": (LOGITS, TARGETS, {}, 1.6739764, [[0.25, -0.5, 0.25], [-0.625, 0.125, 0.5]], 1.0),
    # Smoothed by 0.3: targets (0.1, 0.8, 0.1) and (0.8, 0.1, 0.1); the gradient is softmax - target.
    "single_label, smoothed": (
        LOGITS, TARGETS, {"label_smoothing": 0.3}, 0.2 * 1.3862944 + 0.8 * 0.6931472 + 0.8 * 0.9808293 + 0.1 * 2.0794415 + 0.1 * 0.6931472,
        [[0.15, -0.3, 0.15], [-0.425, 0.025, 0.4]], 1.0,
    ),
    # Sigmoids of (0, ln 3) are 1/2 and 3/4: (ln 2 + ln 4) / 2 where the second label is wrong; (sigmoid - target) / 2.
    "multi_label": ([[0.0, 1.0986123]], [[1.0, 0.0]], {}, 1.0397208, [[-0.25, 0.375]], 0.0),
    # (3 - 1)^2 + (0.5 - 1)^2 = 4.25; twice the differences.
    "regression": ([[3.0], [0.5]], [[1.0], [1.0]], {}, 4.25, [[4.0], [-1.0]], None),
}  # fmt: skip


def classified(case: str, planted: bool = False) -> tuple[float, list[list[float]], float | None]:
    logits, targets, settings, *_ = BY_HAND[case]
    outputs_RC = torch.tensor(logits, requires_grad=True)
    targets_RC = torch.tensor(targets)
    # Planted: the targets of neighbours.
    tensors = {
        "outputs_RC": outputs_RC,
        "targets_RC": targets_RC.roll(1, 1) + (0.5 if case == "regression" else 0.0) if planted else targets_RC,
    }
    result = classify.loss(tensors, problem=case.partition(",")[0], **settings)
    assert float(result.weight_sum) == len(logits)
    result.loss_sum.backward()
    return float(result.loss_sum.detach()), outputs_RC.grad.tolist(), float(result.metrics["accuracy"]) if result.metrics else None


@pytest.mark.parametrize("case", BY_HAND)
def test_classification_by_hand(case: str):
    *_, expected, gradient, right = BY_HAND[case]
    loss_sum, found, num_right = classified(case)
    assert loss_sum == pytest.approx(expected, abs=allowed("hand_worked"))
    assert found == [pytest.approx(row, abs=allowed("hand_worked")) for row in gradient]
    assert num_right == right
    assert abs(classified(case, planted=True)[0] - expected) > PLANTED_FACTOR * allowed("hand_worked")


@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression"])
def test_classification_gradients_against_finite_differences(problem: str):
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.eye(3, dtype=torch.float64)[[0, 2, 1, 1]]
    assert torch.autograd.gradcheck(lambda x: classify.loss({"outputs_RC": x, "targets_RC": targets}, problem=problem).loss_sum, outputs)
