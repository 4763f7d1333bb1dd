"""Objectives on drawn answers: by hand, against the published formulas written out token by token, and against finite differences."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from parity.tolerances import PLANTED_FACTOR, allowed

from giong.config import ObjectiveConfig
from giong.objectives import objective_of
from giong.workflow.drawing import group_relative, leave_one_out

GENERATOR = np.random.default_rng(5)
LENGTHS = (3, 5, 2, 4)
NOW, OLD, REFERENCE = ([(-GENERATOR.gamma(2.0, size=length)).tolist() for length in LENGTHS] for _ in range(3))
ADVANTAGES = [1.2, -0.4, -1.0, 0.2]
CONFIG = {
    "grpo": ObjectiveConfig(name="grpo", beta=0.3, num_updates=2, clip_epsilon=0.2),
    "rloo": ObjectiveConfig(name="rloo", beta=0.3),
}  # fmt: skip


def tensors_of(logprobs_N: torch.Tensor, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    rows = [row for row, length in enumerate(LENGTHS) for _ in range(length)]
    return {
        "logprobs_N": logprobs_N, "row_of_N": torch.tensor(rows), "weights_N": torch.tensor([1 / LENGTHS[row] for row in rows], dtype=dtype),
        "advantages_R": torch.tensor(ADVANTAGES, dtype=dtype), "old_logprobs_N": torch.tensor(list(chain(*OLD)), dtype=dtype),
        "reference_logprobs_N": torch.tensor(list(chain(*REFERENCE)), dtype=dtype),
    }  # fmt: skip


def grpo_by_formula(planted: str = "") -> float:
    """Equation 3 of 2402.03300 with the estimator of equation 4, written out; the sum over answers."""
    total = 0.0
    for now, old, reference, advantage in zip(NOW, OLD, REFERENCE, ADVANTAGES):
        answer = 0.0
        for token, before, base in zip(now, old, reference):
            ratio = math.exp(token - before)
            clipped = min(max(ratio, 0.8), 1.2)
            gain = ratio * advantage if planted == "no clip" else min(ratio * advantage, clipped * advantage)
            kl = math.exp(base - token) - (base - token) - 1
            answer += gain - 0.3 * (token - base if planted == "k1" else kl)
        total += answer if planted == "sums" else answer / len(now)
    return -total


def rloo_by_formula(planted: str = "") -> float:
    """The surrogate whose gradient is equation 8 of 2402.14740: advantage times the log-probability of the whole answer."""
    return -sum((np.mean if planted == "means" else np.sum)(now) * advantage for now, advantage in zip(NOW, ADVANTAGES))


def computed(name: str) -> Any:
    return objective_of(CONFIG[name])(tensors_of(torch.tensor(list(chain(*NOW)))))


@pytest.mark.parametrize(
    ("name", "formula", "planted"),
    [("grpo", grpo_by_formula, ("no clip", "k1", "sums")), ("rloo", rloo_by_formula, ("means",))], ids=["grpo", "rloo"],
)  # fmt: skip
def test_equal_to_the_published_formula(name: str, formula: Any, planted: tuple[str, ...]):
    result = computed(name)
    assert float(result.loss_sum) == pytest.approx(formula(), abs=allowed("hand_worked") * 10)
    assert float(result.weight_sum) == pytest.approx(len(LENGTHS))
    for error in planted:
        assert abs(float(result.loss_sum) - formula(error)) > PLANTED_FACTOR * allowed("hand_worked")


def test_grpo_by_hand():
    """One answer of one token: p = 0.5 now, 0.25 when drawn, 0.5 in the reference; ratio 2, clipped to 1.2, advantage 1: gain 1.2."""
    tensors = {
        "logprobs_N": torch.tensor([math.log(0.5)]), "row_of_N": torch.tensor([0]), "weights_N": torch.ones(1),
        "advantages_R": torch.ones(1), "old_logprobs_N": torch.tensor([math.log(0.25)]), "reference_logprobs_N": torch.tensor([math.log(0.5)]),
    }  # fmt: skip
    result = objective_of(CONFIG["grpo"])(tensors)
    assert float(result.loss_sum) == pytest.approx(-1.2, abs=allowed("hand_worked"))
    assert {name: float(value) for name, value in result.metrics.items()} == {
        "entropy": pytest.approx(0.6931472, abs=allowed("hand_worked")), "clip_share": 1.0, "kl": pytest.approx(0.0, abs=1e-6),
    }  # fmt: skip


@pytest.mark.parametrize("name", CONFIG)
def test_gradients_against_finite_differences(name: str):
    logprobs = torch.tensor(list(chain(*NOW)), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: objective_of(CONFIG[name])(tensors_of(x, torch.float64)).loss_sum, logprobs)


def test_advantages_by_hand():
    """Rewards 1, 2, 3 and 5, 5, 5: deviations of sqrt(2/3), and none; the others' means of the first are 2.5, 2 and 1.5."""
    rewards = np.array([1.0, 2.0, 3.0, 5.0, 5.0, 5.0])
    assert group_relative(rewards, 3) == pytest.approx([-1.2247449, 0.0, 1.2247449, 0.0, 0.0, 0.0])
    assert leave_one_out(rewards, 3) == pytest.approx([-1.5, 0.0, 1.5, 0.0, 0.0, 0.0])
