"""The element-wise formulas of `elementwise.py` written for a compiler: each becomes one loop over memory.

`torch.compile` takes some twenty seconds for its first function and about one for each further, and needs a C++ compiler on the
machine; so it is switched on for runs that are long enough to earn it back (`train.compile`), and is never a requirement.
Both forms compute in fp32 and round once, but not in the same order, so which one ran is part of the run's record.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable

import torch

from giong.engine.elementwise import ACTIVATIONS, EAGER, Kernels


def _norm_forward(x_TD: torch.Tensor, weight_D: torch.Tensor, offset: float, epsilon: float) -> torch.Tensor:
    x = x_TD.float()
    x = x * (x * x).mean(-1, keepdim=True).add(epsilon).rsqrt()
    return x.to(x_TD.dtype) * weight_D if offset == 0.0 else (x * (weight_D.float() + offset)).to(x_TD.dtype)


def _norm_backward_input(grad_TD: torch.Tensor, x_TD: torch.Tensor, gain_D: torch.Tensor, epsilon: float) -> torch.Tensor:
    x, grad = x_TD.float(), grad_TD.float() * gain_D.float()
    scale = (x * x).mean(-1, keepdim=True).add(epsilon).rsqrt()
    return ((grad - x * ((grad * x).mean(-1, keepdim=True) * scale * scale)) * scale).to(x_TD.dtype)


def _norm_backward_gain(grad_TD: torch.Tensor, x_TD: torch.Tensor, epsilon: float) -> torch.Tensor:
    x = x_TD.float()
    return (grad_TD.float() * x * (x * x).mean(-1, keepdim=True).add(epsilon).rsqrt()).sum(0)


def _turn(x_HTE: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor, sign: float) -> torch.Tensor:
    half = x_HTE.shape[-1] // 2
    first, second = x_HTE[..., :half].float(), x_HTE[..., half:].float()
    cos, sin = cos_TE[:, :half].float(), sin_TE[:, :half].float() * sign
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x_HTE.dtype)


def _gated_forward(gate_TF: torch.Tensor, up_TF: torch.Tensor, activation: str) -> torch.Tensor:
    return (ACTIVATIONS[activation].value(gate_TF.float()) * up_TF.float()).to(gate_TF.dtype)


def _gated_backward(
    grad_TF: torch.Tensor, gate_TF: torch.Tensor, up_TF: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gate, up, grad = gate_TF.float(), up_TF.float(), grad_TF.float()
    value = ACTIVATIONS[activation].value(gate)
    of_gate = ACTIVATIONS[activation].backward(grad * up, gate)
    return of_gate.to(gate_TF.dtype), (value * grad).to(gate_TF.dtype), (value * up).to(gate_TF.dtype)


def can_compile() -> bool:
    """Whether a C++ compiler is there for torch.compile's CPU back end (a GPU's comes with torch)."""
    return torch.cuda.is_available() or any(shutil.which(name) for name in ("c++", "g++", "clang++"))


@functools.cache
def compiled_kernels() -> Kernels:
    # Packs differ in length at every step: one graph for all lengths, or compiling would never end.
    make: Callable = functools.partial(torch.compile, dynamic=True)
    of_input, of_gain = make(_norm_backward_input), make(_norm_backward_gain)

    def norm_backward(grad_TD, x_TD, gain_D, epsilon, needs_gain):  # type: ignore[no-untyped-def]
        return of_input(grad_TD, x_TD, gain_D, epsilon), of_gain(grad_TD, x_TD, epsilon) if needs_gain else None

    return dataclasses.replace(
        EAGER, norm_forward=make(_norm_forward), norm_backward=norm_backward, turn=make(_turn), gated_forward=make(_gated_forward),
        gated_backward=make(_gated_backward),
    )  # fmt: skip
