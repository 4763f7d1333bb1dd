"""What lies between the matrix products: RMS norm, rotary positions, the gated activation, the softmax of the head, each with its
own backward pass; and the sum that ends a low-rank update.

Autograd records these as ten or more operations, each of which reads and writes its whole tensor. The formulas here work in
place and keep only what the neighbouring matrix products keep anyway.

One decision a reader may question: in-place operations, a compiled twin of most formulas (`compiled.py`) and a fused one
(`triton_kernels.py`). The compiler pays once a run is long and needs a C++ compiler on the machine, Triton needs a GPU; without
either, these are what runs.

Axis letters: T tokens, D width, F width of the MLP, H heads, E head width, N positions with loss, V vocabulary, R rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

SLICE_ELEMENTS = 4 * 1024 * 1024
"""Elements taken to fp32 at once: 16 MiB. Smaller slices stay in cache but cost the threads a meeting per operation; measured,
the two cancel, so the bound is there for memory alone."""


SLICE_LOGITS = 1024 * 1024
"""Logits taken to fp32 at once: 4 MiB, which stays in cache."""

SLICE_LOGITS_ON_GPU = 16 * 1024 * 1024
"""And on a GPU: 64 MiB. Of a vocabulary of 150,000, slices that fit into a core's cache would be of six positions, one for each of six
cores of 132."""


def _slices(tensor: torch.Tensor) -> Iterator[slice]:
    step = max(1, SLICE_ELEMENTS // tensor.shape[-1])
    for start in range(0, tensor.shape[0], step):
        yield slice(start, start + step)


def _inverse_rms(x_TD: torch.Tensor, epsilon: float) -> torch.Tensor:
    """(mean(x^2) + epsilon)^-1/2 as (T, 1); the dot product reads x once and writes nothing of its size."""
    return torch.linalg.vecdot(x_TD, x_TD)[:, None].div_(x_TD.shape[-1]).add_(epsilon).rsqrt_()


def norm_forward(x_TD: torch.Tensor, weight_D: torch.Tensor, offset: float, epsilon: float) -> torch.Tensor:
    """y = (weight + offset) x r with r = (mean(x^2) + epsilon)^-1/2, for x (T, D) and weight (D)."""
    output = torch.empty_like(x_TD)
    for part in _slices(x_TD):
        x = x_TD[part].to(torch.float32, copy=True)
        x.mul_(_inverse_rms(x, epsilon))
        # Llama rounds before the gain, Gemma (whose gain is 1 + weight) after it.
        output[part] = x.to(x_TD.dtype).mul_(weight_D) if offset == 0.0 else x.mul_(weight_D.float() + offset)
    return output


def norm_backward(
    grad_TD: torch.Tensor, x_TD: torch.Tensor, gain_D: torch.Tensor, epsilon: float, needs_gain: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of y = g x r for x (T, D) and g (D, in fp32): dx = r (g dy - x r^2 mean(g dy x))."""
    of_x = torch.empty_like(x_TD)
    of_gain = torch.zeros(gain_D.shape, dtype=torch.float32, device=x_TD.device) if needs_gain else None
    gain = gain_D.float()
    for part in _slices(x_TD):
        x = x_TD[part].float()
        grad = grad_TD[part].to(torch.float32, copy=True)
        scale = _inverse_rms(x, epsilon)
        if of_gain is not None:
            of_gain += (grad * x).mul_(scale).sum(0)
        grad.mul_(gain)
        pull = torch.linalg.vecdot(grad, x)[:, None].mul_(scale.square()).div_(-x.shape[-1])
        of_x[part] = grad.addcmul_(x, pull).mul_(scale)
    return of_x, of_gain


def turn(x_HTE: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor, sign: float) -> torch.Tensor:
    """Rotate the pairs (i, i + E/2) by `sign` times their angles; the halves of cos and sin are equal. Contiguous per head."""
    half = x_HTE.shape[-1] // 2
    output = torch.empty(x_HTE.shape, dtype=x_HTE.dtype, device=x_HTE.device)
    first, second = x_HTE[..., :half], x_HTE[..., half:]
    cos, sin = cos_TE[:, :half], sin_TE[:, :half]
    torch.mul(first, cos, out=output[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=output[..., half:]).addcmul_(first, sin, value=sign)
    return output


@dataclass(frozen=True)
class Activation:
    """A gate's activation: its value, and its derivative times a gradient."""

    value: Callable[[torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(torch.nn.functional.silu, torch.ops.aten.silu_backward),
    "gelu": Activation(torch.nn.functional.gelu, torch.ops.aten.gelu_backward),
    "gelu_pytorch_tanh": Activation(
        lambda gate: torch.nn.functional.gelu(gate, approximate="tanh"),
        lambda grad, gate: torch.ops.aten.gelu_backward(grad, gate, approximate="tanh"),
    ),
}
"""By the names of transformers' `hidden_act`."""


def gated_forward(gate_TF: torch.Tensor, up_TF: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up."""
    return ACTIVATIONS[activation].value(gate_TF).mul_(up_TF)


def gated_backward(
    grad_TF: torch.Tensor, gate_TF: torch.Tensor, up_TF: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(gradient of gate, gradient of up, act(gate) * up formed again); the memory of `grad_TF` may become that of the first."""
    hidden = ACTIVATIONS[activation].value(gate_TF)
    of_up = hidden * grad_TF
    hidden.mul_(up_TF)
    for part in _slices(gate_TF):
        grad = grad_TF[part]
        grad.copy_(ACTIVATIONS[activation].backward(grad.mul_(up_TF[part]), gate_TF[part]))
    return grad_TF, of_up, hidden


def slice_positions(device: torch.device, vocabulary: int) -> int:
    """Positions whose logits are taken to fp32 at once."""
    return max(1, (SLICE_LOGITS if device.type == "cpu" else SLICE_LOGITS_ON_GPU) // vocabulary)


def logprobs_and_gradient(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, logprobs_N: torch.Tensor, softcap: float | None, scale: float, needs_gradient: bool
) -> None:
    """Fill `logprobs_N`; replace `logits_NV` by softmax - onehot (through scale and cap), rounded to its dtype, if needed."""
    step = slice_positions(logits_NV.device, logits_NV.shape[1])
    for start in range(0, len(targets_N), step):
        part = slice(start, start + step)
        targets = targets_N[part, None]
        logits = logits_NV[part]
        if scale != 1.0 or softcap is not None:
            logits = logits.float() * scale
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        gradient = torch.softmax(logits, 1, dtype=torch.float32)
        chosen = gradient.gather(1, targets)
        if logits.is_cuda or not bool((chosen > torch.finfo(torch.float32).tiny).all()):
            # A share too small for fp32 has a logarithm all the same; a GPU would have to be waited for to know.
            logprobs_N[part] = torch.log_softmax(logits, 1, dtype=torch.float32).gather(1, targets)[:, 0]
        else:
            logprobs_N[part] = chosen.log()[:, 0]
        if not needs_gradient:
            continue
        gradient.scatter_add_(1, targets, chosen.new_full(chosen.shape, -1.0))
        if softcap is not None:
            gradient *= 1 - (logits / softcap) ** 2
        if scale != 1.0:
            gradient *= scale
        logits_NV[part] = gradient


def add_product(output_TN: torch.Tensor, left_TR: torch.Tensor, right_RN: torch.Tensor, scale: float) -> None:
    """Add scale * left @ right to `output_TN`, where R is the small rank of an update."""
    output_TN.addmm_(left_TR, right_RN, alpha=scale)


@dataclass(frozen=True)
class Kernels:
    """One form of the formulas above, eager, compiled or fused, by their names."""

    norm_forward: Callable
    norm_backward: Callable
    turn: Callable
    gated_forward: Callable
    gated_backward: Callable
    logprobs_and_gradient: Callable
    add_product: Callable


EAGER = Kernels(norm_forward, norm_backward, turn, gated_forward, gated_backward, logprobs_and_gradient, add_product)

_in_use = EAGER


@contextlib.contextmanager
def use_kernels(kernels: Kernels | None) -> Iterator[None]:
    """Within this block the layers compute with `kernels`; None stands for the eager ones. Forward and backward belong in one block."""
    global _in_use
    before, _in_use = _in_use, kernels or EAGER
    try:
        yield
    finally:
        _in_use = before


def kernels() -> Kernels:
    """The kernels in use."""
    return _in_use


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_D, offset, epsilon):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x_TD, weight_D)
        ctx.offset, ctx.epsilon = offset, epsilon
        return _in_use.norm_forward(x_TD, weight_D, offset, epsilon)

    @staticmethod
    def backward(ctx, grad_TD):  # type: ignore[no-untyped-def]
        x_TD, weight_D = ctx.saved_tensors
        gain = weight_D if ctx.offset == 0.0 else weight_D.float() + ctx.offset
        of_x, of_gain = _in_use.norm_backward(grad_TD, x_TD, gain, ctx.epsilon, ctx.needs_input_grad[1])
        return of_x, None if of_gain is None else of_gain.to(weight_D.dtype), None, None


@dataclass(eq=False, slots=True)
class FormedAgain:
    """A norm's output in the backward pass: formed once for all its `num_readers` and let go of by the last."""

    offset: float
    epsilon: float
    num_readers: int = 0
    output_TD: torch.Tensor | None = None

    def read(self, input_TD: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
        """The output, of the same kernel and inputs as in the forward pass: equal to the bit."""
        output_TD = self.output_TD
        if output_TD is None:
            output_TD = _in_use.norm_forward(input_TD, weight_D, self.offset, self.epsilon)
        self.num_readers -= 1
        self.output_TD = output_TD if self.num_readers > 0 else None
        return output_TD


class Normed(NamedTuple):
    """What a norm's output was formed from: the norm keeps its input for its own backward pass, so a matrix that reads the output
    need not keep that as well. `rms_norm` leaves it on its output as the attribute `normed`, with the output's `version` of that moment;
    `normed_of` reads it."""

    input_TD: torch.Tensor
    weight_D: torch.Tensor
    again: FormedAgain
    version: int


def normed_of(x: torch.Tensor) -> Normed | None:
    """What `x` was formed from, if it is a norm's output as the norm gave it: changed in place since, it would be formed unchanged."""
    normed: Normed | None = getattr(x, "normed", None)
    return normed if normed is not None and normed.version == x._version else None


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, *, epsilon: float, offset: float = 0.0) -> torch.Tensor:
    """x (..., D) divided by its root mean square, times `weight_D + offset`."""
    flat_TD = x.reshape(-1, x.shape[-1])
    output = _RmsNorm.apply(flat_TD, weight_D, offset, epsilon).view(x.shape)
    if output.requires_grad:
        output.normed = Normed(flat_TD.detach(), weight_D.detach(), FormedAgain(offset, epsilon), output._version)
    return output


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_HTE, cos_TE, sin_TE):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos_TE, sin_TE)
        return _in_use.turn(x_HTE, cos_TE, sin_TE, 1.0)

    @staticmethod
    def backward(ctx, grad_HTE):  # type: ignore[no-untyped-def]
        return _in_use.turn(grad_HTE, *ctx.saved_tensors, -1.0), None, None


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions (Su et al. 2021, 2104.09864) for x (1, H, T, E), cos and sin (1, T, E)."""
    return _Rotary.apply(x[0], cos[0], sin[0]).unsqueeze(0)
