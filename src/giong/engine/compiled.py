"""The element-wise formulas of `elementwise.py` written for a compiler: each becomes one loop over memory.

`torch.compile` takes some twenty seconds for its first function and about one for each further, and needs a C++ compiler on the
machine; so it is switched on for runs that are long enough to earn it back (`train.compile`), and is never a requirement:
`kernel_choice.py` takes these kernels after a trial alone.
Both forms compute in fp32 and round once, but not in the same order, so which one ran is part of the run's record.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

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


def has_triton() -> bool:
    return find_spec("triton") is not None


def missing_to_compile(device: torch.device) -> str | None:
    """What torch.compile is seen to lack for this device, as a sentence without its full stop and with the remedy; None where nothing is.

    Only a trial shows that the tools which are there also work.
    """
    if device.type == "cuda":
        return None if has_triton() else "torch.compile needs Triton on a GPU: pip install triton"
    if not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")))):
        return "torch.compile needs a C++ compiler: apt-get install g++ (or your system's equivalent)"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "torch.compile needs Python's headers: apt-get install python3-dev (or your system's equivalent)"
    return None


def _compile(function: Callable) -> Callable:
    @functools.cache
    def compiled() -> Callable:
        # Packs differ in length at every step: one graph for all lengths, or compiling would never end.
        return torch.compile(function, dynamic=True)

    def call(*given: object) -> object:
        # A graph is made for tensors that need a gradient or for such that do not: bare, those of a trial and of a training share theirs.
        return compiled()(*(each.detach() if isinstance(each, torch.Tensor) else each for each in given))

    return call


@functools.cache
def compiled_kernels() -> Kernels:
    """The formulas of this file, each of which is compiled when it is first called: that call may raise whatever a compiler raises."""
    of_input, of_gain = _compile(_norm_backward_input), _compile(_norm_backward_gain)

    def norm_backward(grad_TD, x_TD, gain_D, epsilon, needs_gain):  # type: ignore[no-untyped-def]
        return of_input(grad_TD, x_TD, gain_D, epsilon), of_gain(grad_TD, x_TD, epsilon) if needs_gain else None

    return dataclasses.replace(
        EAGER, norm_forward=_compile(_norm_forward), norm_backward=norm_backward, turn=_compile(_turn),
        gated_forward=_compile(_gated_forward), gated_backward=_compile(_gated_backward),
    )  # fmt: skip
