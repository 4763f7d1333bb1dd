"""Which form of the element-wise formulas a run computes with: fused in Triton on a GPU, compiled, or eager."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from giong.engine.compiled import compiled_kernels, has_triton, missing_to_compile
from giong.engine.elementwise import ACTIVATIONS, EAGER, Kernels, use_kernels

TRIAL_TOKENS, TRIAL_WIDTH, TRIAL_HEADS, TRIAL_RANK = 5, 64, 3, 4

ROUNDINGS = 8
"""Steps of the dtype, relative to the largest number, by which a kernel may differ: both round two or three times."""


@functools.cache
def fused_kernels(device: torch.device, dtype: torch.dtype) -> Kernels | None:
    """The Triton kernels for tensors of this dtype on this device; None off a GPU, and where they are absent or do not pass the trial."""
    if device.type != "cuda" or not has_triton():
        return None
    try:
        from giong.engine.triton_kernels import TRITON
    except ImportError:
        return None
    return TRITON if agrees(TRITON, device, dtype) else None


def compiled_that_serve(model: PreTrainedModel) -> Kernels | None:
    """The compiled kernels for this model where it is; None where they cannot be compiled there, or do not pass the trial.

    The first call for a device and dtype compiles, which takes about half a minute; the training then finds the graphs made.
    """
    used = {type(module) for module in model.modules()}
    # Each activation is a graph of its own: those that the model does not use are not waited for.
    activations = tuple(name for name in ACTIVATIONS if type(ACT2FN[name]) in used)
    return _compiled_that_serve(model.device, model.dtype, activations)


@functools.cache
def _compiled_that_serve(device: torch.device, dtype: torch.dtype, activations: tuple[str, ...]) -> Kernels | None:
    if missing_to_compile(device) is not None:
        return None
    kernels = compiled_kernels()
    return kernels if agrees(kernels, device, dtype, activations=activations) else None


@torch.no_grad()
def agrees(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, num_tokens: int = TRIAL_TOKENS, width: int = TRIAL_WIDTH, *,
    activations: Iterable[str] = tuple(ACTIVATIONS),
) -> bool:  # fmt: skip
    """Whether kernels give what the engine's own formulas give on random numbers (a few, if not told), to the rounding of the dtype."""
    try:
        found = _trial(kernels, device, dtype, num_tokens, width, activations)
    # Compilers raise errors of their own classes, those of the tools that they call, and Python's: none may stop a run.
    except Exception:
        return False
    return all(_same(a, b, dtype) for a, b in zip(found, _trial(EAGER, device, dtype, num_tokens, width, activations), strict=True))


def _trial(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, num_tokens: int, width: int, activations: Iterable[str]
) -> list[torch.Tensor]:  # fmt: skip
    """Every result of every formula, always of the same inputs; of what it may write over a formula is given a copy."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    x, grad, up = (draw(num_tokens, width) for _ in range(3))
    weight = draw(width)
    found: list[torch.Tensor] = []
    for offset in (0.0, 1.0):
        gain = weight if offset == 0.0 else weight.float() + offset
        found.append(kernels.norm_forward(x, weight, offset, 1e-6))
        found += kernels.norm_backward(grad, x, gain, 1e-6, True)
        found.append(kernels.norm_backward(grad, x, gain, 1e-6, False)[0])
    for activation in activations:
        found.append(kernels.gated_forward(x, up, activation))
        found += kernels.gated_backward(grad.clone(), x, up, activation)
    heads = draw(num_tokens, TRIAL_HEADS, width).transpose(0, 1)
    angles = draw(num_tokens, width // 2).repeat(1, 2)
    found += [kernels.turn(heads, angles.cos(), angles.sin(), sign) for sign in (1.0, -1.0)]
    targets = torch.arange(num_tokens, device=device) % width
    for softcap, scale in ((None, 1.0), (2.0, 0.5)):
        logits, logprobs = x.clone(), torch.empty(num_tokens, dtype=torch.float32, device=device)
        kernels.logprobs_and_gradient(logits, targets, logprobs, softcap, scale, True)
        found += [logits, logprobs]
    output, left, right = x.clone(), draw(num_tokens, TRIAL_RANK), draw(width, TRIAL_RANK).T
    kernels.add_product(output, left, right, 0.5)
    return [*found, output]


def _same(theirs: torch.Tensor, ours: torch.Tensor, dtype: torch.dtype) -> bool:
    if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return False
    difference, largest = (theirs.float() - ours.float()).abs().max(), ours.float().abs().max()
    return bool(difference <= ROUNDINGS * torch.finfo(dtype).eps * largest)


def elementwise_of_run(model: PreTrainedModel, *, compiled: bool) -> AbstractContextManager[None]:
    """A block within which a run's kernels are in use: the compiled ones where asked for, else the fused, else the eager; the first two
    where they pass their trial alone. A process of several in which they do not goes on with others, whose numbers agree to rounding."""
    asked = compiled_that_serve(model) if compiled else None
    return use_kernels(asked or fused_kernels(model.device, model.dtype))
