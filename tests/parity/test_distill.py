"""Distillation: the objective by hand, and the engine's divergence of two models against their own logits."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from parity.tolerances import PLANTED_FACTOR, allowed

from giong.config import ObjectiveConfig
from giong.engine.packing import pack
from giong.engine.step import backward
from giong.engine.teacher import Teacher
from giong.models.rows import Row
from giong.objectives import objective_of

HALF = ObjectiveConfig(name="distill", teacher="t", teacher_share=0.25)


def test_by_hand():
    """Probabilities 1/2 and 1/4 at weights 1 and 2, divergences 0.3 and 0.1: 0.25 x (0.3 + 0.2) + 0.75 x (ln 2 + 2 ln 4) = 2.7243019.

    Where the student drew the answers, 0.25 x 0.5 is left.
    """
    tensors = {
        "logprobs_N": torch.tensor([0.5, 0.25]).log(),
        "weights_N": torch.tensor([1.0, 2.0]),
        "teacher_kl_N": torch.tensor([0.3, 0.1]),
    }
    result = objective_of(HALF)(tensors)
    assert float(result.loss_sum) == pytest.approx(2.7243019, abs=allowed("hand_worked"))
    assert float(result.weight_sum) == 3.0
    assert float(result.metrics["nll"]) == pytest.approx(5 * math.log(2), abs=allowed("hand_worked"))
    drawn = objective_of(HALF)({**tensors, "drawn_N": torch.ones(2)})
    assert float(drawn.loss_sum) == pytest.approx(0.125, abs=allowed("hand_worked"))


def test_gradients_against_finite_differences():
    inputs = [
        torch.tensor([-0.7, -1.4], dtype=torch.float64, requires_grad=True),
        torch.tensor([0.3, 0.1], dtype=torch.float64, requires_grad=True),
    ]
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda logprobs, kl: objective_of(HALF)({"logprobs_N": logprobs, "weights_N": weights, "teacher_kl_N": kl}).loss_sum, inputs
    )


ROWS = [Row(np.arange(5, 5 + length), np.array([0, 0, *[1] * (length - 2)], dtype=np.float32)) for length in (7, 11)]


def by_logits(student: torch.nn.Module, teacher: torch.nn.Module, planted: str = "") -> float:
    """KL(teacher || student) summed over the answers' tokens, from whole logits, row by row; the teacher knows two tokens more."""
    total = 0.0
    for row in ROWS:
        ids = torch.as_tensor(row.input_ids)[None]
        now, other = (model(input_ids=ids).logits[0, 1:-1] for model in (student, teacher))
        then = other[:, : now.shape[1]].log_softmax(-1)
        if planted == "padding":
            then = other.log_softmax(-1)[:, : now.shape[1]]
        if planted == "shifted":
            then = then.roll(1, 0)
        now = now.log_softmax(-1)
        total += float((now.exp() * (now - then)).sum() if planted == "direction" else (then.exp() * (then - now)).sum())
    return total


def test_two_models_against_their_own_logits(tiny_model: Callable):
    """A wider and deeper teacher with a longer vocabulary, packed with the student; and the gradient lowers the divergence."""
    student = tiny_model("llama").model.requires_grad_(True)
    changes = {"hidden_size": 80, "intermediate_size": 112, "num_hidden_layers": 3}
    teacher = tiny_model("llama", vocab_size=student.config.vocab_size + 2, **changes).model
    compute = Teacher(teacher).forward
    objective = objective_of(ObjectiveConfig(name="distill", teacher="t", teacher_share=1.0))
    with torch.no_grad():
        expected = by_logits(student, teacher)
        found = float(compute(student, pack(ROWS))["teacher_kl_N"].sum())
        assert found == pytest.approx(expected, rel=1e-5)
        for error in ("padding", "shifted", "direction"):
            assert abs(found / by_logits(student, teacher, error) - 1) > PLANTED_FACTOR * 1e-5
    before = backward(student, ROWS, objective, 64, forward=compute)["loss"]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    slope = sum(float(parameter.grad.square().sum()) for parameter in student.parameters())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter -= 1e-4 / slope * parameter.grad
        after = float(compute(student, pack(ROWS))["teacher_kl_N"].sum()) / 14
    # A step of 1e-4 / |g|^2 along -g lowers a function by 1e-4, to first order.
    assert before - after == pytest.approx(1e-4, rel=0.1)
    assert float(Teacher(student).forward(student, pack(ROWS))["teacher_kl_N"].detach().abs().max()) < 1e-6
