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
    "squared_gradients": Tolerance(3e-6, "relative to the largest gradient of the tensor: as token_gradients, times log-probabilities"),
    "finite_differences": Tolerance(2e-3, "central differences of an fp32 function with step 1e-2: truncation 1e-4, rounding 1e-5 / 1e-2"),
    "trajectory_loss": Tolerance(2e-4, "nats per token after 50 AdamW steps: differences of 1e-7 per step are amplified by g / sqrt(v)"),
    "trajectory_grad_norm": Tolerance(2e-3, "relative, over 50 steps: as the loss, and the norm is a sum over all parameters"),
    "trajectory_loss_bf16": Tolerance(
        1.2e-2,
        "nats per token, mean over steps: bf16 carries 2 to 3 digits, and processors sum its products differently; 0.6e-2 at most here",
    ),
    "trajectory_grad_norm_bf16": Tolerance(
        4e-2,
        "relative, mean over steps: as the loss, and small differences of weights turn gradients more than losses; 2.3e-2 at most here",
    ),
    "trajectory_loss_bf16_cuda": Tolerance(
        5e-2, "nats per token, mean over 50 steps, bf16 on a GPU against fp32 on the CPU: small steps are lost in bf16's weights as well"
    ),
    "merged_logits": Tolerance(5e-5, "fp32: W x + B A x against (W + B A) x"),
    "scores": Tolerance(2e-5, "nats, fp32: as packed_logprobs"),
    "attention": Tolerance(
        1e-11, "relative, fp64 both ways: sums of up to 600 products in another order; numbers below 1e-3 count as 1e-3"
    ),
    "attention_fp32": Tolerance(5e-6, "relative, fp32 against fp64: scores up to about 5 carry 3e-7, and so do their shares"),
    "attention_bf16": Tolerance(
        2e-2, "relative, bf16 against fp64: numbers are rounded to 2^-9 on the way in, between the products and at the end"
    ),
    "attention_cuda_fp32": Tolerance(
        2e-5, "relative, fp32 against fp64: as attention_fp32, with exponentials to base 2 and sums over blocks of 64 keys"
    ),
    "lora_linear": Tolerance(5e-6, "relative to the largest number of the tensor, fp32 both ways: one more or one less rounding per sum"),
    "column_norm": Tolerance(2e-6, "relative, fp32: three sums of squares instead of one, without cancellation"),
    "column_norm_bf16": Tolerance(
        2e-3, "relative, bf16 weights against fp64: W A^T is rounded to 2^-9 and is a small part of the norm here"
    ),
    "main_part": Tolerance(5e-5, "fp32: a randomised decomposition of all directions against LAPACK's"),
    "main_part_gradients": Tolerance(1e-3, "relative, fp32: as main_part, and singular vectors of near values are less sure than these"),
    "elementwise": Tolerance(2e-6, "relative to the largest number of the tensor, fp32 both ways: ten roundings at most"),
    "gated_mlp": Tolerance(5e-6, "relative to the largest number of the tensor, fp32 both ways: as lora_linear, behind an activation"),
    "filled_up": Tolerance(8e-3, "relative, bf16 both ways: another shape is another kernel, which adds in another order and rounds once"),
    "bf16_error_ratio": Tolerance(1.5, "our bf16 error against fp64 over transformers' own on the same numbers: no more than its scatter"),
    "bf16_interpreted_error_ratio": Tolerance(
        3.0, "as bf16_error_ratio, in Triton's interpreter: it cuts bf16 off where a GPU rounds it, twice the error each time"
    ),
    "extreme_logprobs": Tolerance(1e-4, "nats, fp32: log-probabilities down to -400, whose last digit is 3e-5"),
    "extreme_gradients": Tolerance(2e-5, "fp32 against fp64: logits of 400 carry 3e-5 into shares, which are 1 or 0 but for a few"),
    "trl": Tolerance(2e-6, "nats, fp64: TRL's ORPO and the divergence of `distill` compute in fp32, on sums of about 3"),
    "hand_worked": Tolerance(1e-6, "fp32 against numbers worked out by hand to seven digits"),
}


def allowed(name: str) -> float:
    return TOLERANCES[name].value


def relative_error(found, expected) -> float:  # type: ignore[no-untyped-def]
    """Largest difference of two tensors over the largest number of the second, which counts as 1e-3 if it is smaller."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-3))
