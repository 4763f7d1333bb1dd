"""How close two computations of one quantity must be, each with its reason: the one table of the parity tests.

A tolerance is the largest absolute difference that is allowed. Every parity test also plants an error and asserts that it
exceeds its tolerance by `PLANTED_FACTOR`, so a tolerance cannot be widened until the test means nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

PLANTED_FACTOR = 10.0


@dataclass(frozen=True, slots=True)
class Tolerance:
    """`value` in the unit of the quantity."""

    value: float
    reason: str


TOLERANCES = {
    "packed_logprobs": Tolerance(2e-5, "nats, fp32: the kernels add in another order; log-probabilities here are between -15 and 0"),
    "gradients": Tolerance(2e-5, "relative to the largest gradient of the parameter, fp32 sums over rows in another order"),
    "token_logprobs": Tolerance(5e-6, "nats: one fp32 log-sum-exp over 50 logits against fp64"),
    "token_gradients": Tolerance(5e-6, "fp32 softmax differences against fp64 autograd; gradients here are at most about 1"),
    "finite_differences": Tolerance(2e-3, "central differences of an fp32 function with step 1e-2: truncation 1e-4, rounding 1e-5 / 1e-2"),
    "trajectory_loss": Tolerance(2e-4, "nats per token after 20 AdamW steps: differences of 1e-7 per step are amplified by g / sqrt(v)"),
    "trajectory_grad_norm": Tolerance(2e-3, "relative, over 20 steps: as the loss, and the norm is a sum over all parameters"),
    "merged_logits": Tolerance(5e-5, "fp32: W x + B A x against (W + B A) x"),
    "scores": Tolerance(2e-5, "nats, fp32: as packed_logprobs"),
    "hand_worked": Tolerance(1e-6, "fp32 against numbers worked out by hand to seven digits"),
}


def allowed(name: str) -> float:
    return TOLERANCES[name].value
