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
from giong.workflow.advantages import explained_variance, generalised_advantages, group_relative, leave_one_out, token_rewards

GENERATOR = np.random.default_rng(5)
LENGTHS = (3, 5, 2, 4)
NOW, OLD, REFERENCE = ([(-GENERATOR.gamma(2.0, size=length)).tolist() for length in LENGTHS] for _ in range(3))
ADVANTAGES = [1.2, -0.4, -1.0, 0.2]
CONFIG = {
    "grpo": ObjectiveConfig(name="grpo", beta=0.3, num_updates=2, clip_epsilon=0.2),
    "rloo": ObjectiveConfig(name="rloo", beta=0.3),
    "ppo": ObjectiveConfig(name="ppo", clip_epsilon=0.2, value_clip=0.3, value_weight=0.4),
}  # fmt: skip
TOKEN_ADVANTAGES, VALUES, OLD_VALUES, RETURNS = (GENERATOR.normal(size=sum(LENGTHS)).tolist() for _ in range(4))


def tensors_of(logprobs_N: torch.Tensor, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    rows = [row for row, length in enumerate(LENGTHS) for _ in range(length)]
    return {
        "logprobs_N": logprobs_N, "row_of_N": torch.tensor(rows), "weights_N": torch.tensor([1 / LENGTHS[row] for row in rows], dtype=dtype),
        "advantages_R": torch.tensor(ADVANTAGES, dtype=dtype), "old_logprobs_N": torch.tensor(list(chain(*OLD)), dtype=dtype),
        "reference_logprobs_N": torch.tensor(list(chain(*REFERENCE)), dtype=dtype),
        **{
            name: torch.tensor(values, dtype=dtype) for name, values in
            {"advantages_N": TOKEN_ADVANTAGES, "values_N": VALUES, "old_values_N": OLD_VALUES, "returns_N": RETURNS}.items()
        },
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


def ppo_by_formula(planted: str = "") -> float:
    """Equation 9 of 1707.06347 without its entropy, equation 7 in it, written out; tokens weigh as in `tensors_of`."""
    total, token = 0.0, 0
    for now, old in zip(NOW, OLD):
        for after, before in zip(now, old):
            advantage, value, was, target = TOKEN_ADVANTAGES[token], VALUES[token], OLD_VALUES[token], RETURNS[token]
            ratio = math.exp(after - before)
            clipped = min(max(ratio, 0.8), 1.2)
            gains = {"always clipped": clipped * advantage, "sign": min(ratio, clipped) * advantage}
            gain = gains.get(planted, min(ratio * advantage, clipped * advantage))
            near = was + min(max(value - was, -0.3), 0.3)
            errors = (value - target) ** 2, (near - target) ** 2
            error = (min if planted == "value clip" else max)(errors) / (1 if planted == "half" else 2)
            total += (0.4 * error - gain) / len(now)
            token += 1
    return total


def computed(name: str) -> Any:
    return objective_of(CONFIG[name])(tensors_of(torch.tensor(list(chain(*NOW)))))


@pytest.mark.parametrize(
    ("name", "formula", "planted"),
    [("grpo", grpo_by_formula, ("no clip", "k1", "sums")), ("rloo", rloo_by_formula, ("means",)),
     ("ppo", ppo_by_formula, ("always clipped", "sign", "value clip", "half"))], ids=["grpo", "rloo", "ppo"],
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


def test_ppo_by_hand():
    """p = 0.5 now and 0.25 when drawn, advantage 1: ratio 2, clipped to 1.2. Value 1, 0 when drawn, return 2: the value may have moved to 0.3,
    so its error is (0.3 - 2)^2 / 2 = 1.445; -1.2 + 0.4 x 1.445 = -0.622. The gradient of both is 0: neither may go on.
    """
    values = torch.ones(1, requires_grad=True)
    logprobs = torch.tensor([math.log(0.5)], requires_grad=True)
    named = {"weights_N": 1.0, "advantages_N": 1.0, "returns_N": 2.0, "old_logprobs_N": math.log(0.25), "old_values_N": 0.0}
    tensors = {"logprobs_N": logprobs, "values_N": values, **{name: torch.tensor([value]) for name, value in named.items()}}
    result = objective_of(CONFIG["ppo"])(tensors)
    result.loss_sum.backward()
    assert float(result.loss_sum.detach()) == pytest.approx(-0.622, abs=allowed("hand_worked"))
    assert float(result.metrics["value_loss"]) == pytest.approx(1.445, abs=allowed("hand_worked"))
    assert float(result.metrics["clip_share"]) == 1.0
    assert float(logprobs.grad) == 0.0 and float(values.grad) == 0.0


def test_generalised_advantages_by_hand():
    """Three tokens, divergences 1, 0, -1 at beta 0.1 and reward 2: rewards -0.1, 0, 2.1. Values 1, 0.5, 0.4; gamma 0.5, lambda 0.8.

    Deltas: -0.1 + 0.25 - 1 = -0.85; 0.2 - 0.5 = -0.3; 2.1 - 0.4 = 1.7. Backwards, times 0.4: 1.7; -0.3 + 0.68 = 0.38; -0.85 + 0.152 = -0.698.
    """
    rewards, values = token_rewards(2.0, np.array([1.0, 0.0, -1.0]), 0.1), np.array([1.0, 0.5, 0.4])
    assert rewards == pytest.approx([-0.1, 0.0, 2.1])
    assert generalised_advantages(rewards, values, 0.5, 0.8) == pytest.approx([-0.698, 0.38, 1.7])
    # Lambda 1 is what came minus what was expected; lambda 0 looks one token ahead.
    assert generalised_advantages(rewards, values, 1.0, 1.0) == pytest.approx([1.0, 1.6, 1.7])
    assert generalised_advantages(rewards, values, 1.0, 0.0) == pytest.approx([-0.6, -0.1, 1.7])
    # Returns 1, 2, 3 (variance 2/3), missed by 0, 0, 3 (variance 2) and by 1, 1, 1.
    returns = np.array([1.0, 2.0, 3.0])
    assert explained_variance(np.array([1.0, 2.0, 0.0]), returns) == pytest.approx(-2.0)
    assert explained_variance(returns - 1, returns) == pytest.approx(1.0)
    assert explained_variance(returns, np.ones(3)) == 0.0


def test_the_value_has_a_gradient_too():
    values = torch.tensor(VALUES, dtype=torch.float64, requires_grad=True)
    logprobs = torch.tensor(list(chain(*NOW)), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: objective_of(CONFIG["ppo"])({**tensors_of(logprobs, torch.float64), "values_N": x}).loss_sum, values
    )
