"""liger-kernel's fused RMS norm and gated activation in the place of the engine's own, where the package is installed.

Its kernels fuse what `elementwise.py` does in a few passes over memory, without the seconds that torch.compile takes. They are
used only if a trial on random numbers shows the engine's results, so a version with other arguments or another rounding is
passed over and nothing breaks. Rotary positions stay the engine's: liger turns queries and keys in one call, in place.

One decision a reader may question: its functions are called and not its autograd classes, because those keep the reciprocal
norms; here they are formed again from x, which is one read.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch

from giong.engine.elementwise import EAGER, Kernels

TRIAL_TOKENS, TRIAL_WIDTH = 5, 64
ROUNDINGS = 8
"""Steps of the dtype, relative to the largest number, by which a kernel may differ: both round two or three times."""


def is_installed() -> bool:
    return find_spec("liger_kernel") is not None and find_spec("triton") is not None


@functools.cache
def liger_kernels(device: torch.device, dtype: torch.dtype) -> Kernels | None:
    """liger's kernels for tensors of this dtype on this device; None where they are absent or do not pass the trial."""
    if device.type != "cuda" or not is_installed():
        return None
    try:
        found = _kernels()
    except ImportError:
        return None
    return found if agrees(found, device, dtype) else None


def _kernels() -> Kernels:
    from liger_kernel.ops.geglu import geglu_backward, geglu_forward
    from liger_kernel.ops.rms_norm import rms_norm_backward, rms_norm_forward
    from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward
    from liger_kernel.ops.utils import calculate_settings

    gated = {"silu": (swiglu_forward, swiglu_backward), "gelu_pytorch_tanh": (geglu_forward, geglu_backward)}

    def norm_forward(x_TD: torch.Tensor, weight_D: torch.Tensor, offset: float, epsilon: float) -> torch.Tensor:
        return rms_norm_forward(x_TD.contiguous(), weight_D, epsilon, offset, "llama" if offset == 0.0 else "gemma", None)[0]

    def norm_backward(grad_TD, x_TD, gain_D, epsilon, needs_gain):  # type: ignore[no-untyped-def]
        width = x_TD.shape[-1]
        norms_T = torch.linalg.vector_norm(x_TD, dim=-1, dtype=torch.float32)
        reciprocals_T = norms_T.square_().div_(width).add_(epsilon).rsqrt_()
        block, num_warps = calculate_settings(width)
        # The gain comes with its offset added, and in fp32 where there was one: that is how Gemma's mode computes.
        mode = 0 if gain_D.dtype == x_TD.dtype else 1
        of_x, of_gain = rms_norm_backward(
            grad_TD.contiguous(), x_TD.contiguous(), gain_D, reciprocals_T, 0.0, mode, block, num_warps, False, None
        )
        return of_x, of_gain.float() if needs_gain else None

    def gated_forward(gate_TF: torch.Tensor, up_TF: torch.Tensor, activation: str) -> torch.Tensor:
        if activation not in gated:
            return EAGER.gated_forward(gate_TF, up_TF, activation)
        return gated[activation][0](gate_TF.contiguous(), up_TF.contiguous())[2]

    def gated_backward(grad_TF, gate_TF, up_TF, activation):  # type: ignore[no-untyped-def]
        if activation not in gated:
            return EAGER.gated_backward(grad_TF, gate_TF, up_TF, activation)
        forward, backward = gated[activation]
        gate_TF, up_TF = gate_TF.contiguous(), up_TF.contiguous()
        # First the product: liger writes the gradients over gate and up.
        hidden_TF = forward(gate_TF, up_TF)[2]
        return *backward(gate_TF, up_TF, grad_TF.contiguous()), hidden_TF

    return Kernels(norm_forward, norm_backward, EAGER.turn, gated_forward, gated_backward)


@torch.no_grad()
def agrees(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels give what the engine's own formulas give on a few random tokens, to the rounding of the dtype."""
    generator = torch.Generator().manual_seed(0)
    x, grad, up = (torch.randn(TRIAL_TOKENS, TRIAL_WIDTH, generator=generator).to(device, dtype) for _ in range(3))
    weight = torch.randn(TRIAL_WIDTH, generator=generator).to(device, dtype)

    def results(of: Kernels) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for offset in (0.0, 1.0):
            gain = weight if offset == 0.0 else weight.float() + offset
            found.append(of.norm_forward(x.clone(), weight, offset, 1e-6))
            found.extend(of.norm_backward(grad.clone(), x.clone(), gain, 1e-6, True))
        for activation in ("silu", "gelu_pytorch_tanh"):
            found.append(of.gated_forward(x.clone(), up.clone(), activation))
            # Both may write over what they are given.
            found.extend(of.gated_backward(grad.clone(), x.clone(), up.clone(), activation))
        return found

    try:
        theirs = results(kernels)
    except (TypeError, ValueError, RuntimeError, AssertionError, IndexError):
        return False
    return all(_same(a, b, dtype) for a, b in zip(theirs, results(EAGER), strict=True))


def _same(theirs: torch.Tensor, ours: torch.Tensor, dtype: torch.dtype) -> bool:
    if theirs.shape != ours.shape:
        return False
    difference, largest = (theirs.float() - ours.float()).abs().max(), ours.float().abs().max()
    return bool(difference <= ROUNDINGS * torch.finfo(dtype).eps * largest)
