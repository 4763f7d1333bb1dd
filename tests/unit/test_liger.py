"""liger-kernel's kernels in the place of the engine's: what they are asked, and that a trial stands before their use.

The package needs a GPU, so stand-ins with its functions' arguments compute what its sources say; on a GPU the trial itself is
the test (`agrees`), at every start.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

import giong.engine.liger as liger
from giong.engine.elementwise import EAGER
from giong.engine.liger import agrees, liger_kernels

CPU = torch.device("cpu")


def rms_norm_forward(X, W, eps, offset, casting_mode, row_mode):  # type: ignore[no-untyped-def]
    """Llama's mode rounds before the gain, Gemma's computes in fp32 to the end. Six results, the output first."""
    reciprocal = X.float().square().mean(-1).add(eps).rsqrt()
    normal = X.float() * reciprocal[:, None]
    output = normal.to(X.dtype) * W if casting_mode == "llama" else (normal * (W.float() + offset)).to(X.dtype)
    return output, X, reciprocal, 64, 4, casting_mode


def rms_norm_backward(dY, X, W, RSTD, offset, casting_mode, BLOCK_SIZE, num_warps, in_place, row_mode):  # type: ignore[no-untyped-def]
    x, scale = X.float(), RSTD[:, None]
    pulled = (dY * W).float() if casting_mode == 0 else dY.float() * (W + offset)
    of_x = scale * (pulled - scale * scale * (pulled * x).mean(-1, keepdim=True) * x)
    return of_x.to(X.dtype), (dY.float() * x * scale).sum(0).to(W.dtype)


def gated(value: Callable) -> tuple[Callable, Callable]:
    def forward(a, b):  # type: ignore[no-untyped-def]
        return a, b, (value(a.float()).to(b.dtype) * b)

    def backward(a, b, dc):  # type: ignore[no-untyped-def]
        """Writes the gradients over a and b, as the package does."""
        with torch.enable_grad():
            gate = a.detach().float().requires_grad_(True)
            (slope,) = torch.autograd.grad(value(gate), gate, (dc * b).float())
        b.copy_(value(a.float()) * dc)
        a.copy_(slope)
        return a, b

    return forward, backward


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """A stand-in for the installed package, on the CPU."""
    swiglu, geglu = gated(torch.nn.functional.silu), gated(lambda x: torch.nn.functional.gelu(x, approximate="tanh"))
    functions = {
        "rms_norm": {"rms_norm_forward": rms_norm_forward, "rms_norm_backward": rms_norm_backward},
        "swiglu": {"swiglu_forward": swiglu[0], "swiglu_backward": swiglu[1]},
        "geglu": {"geglu_forward": geglu[0], "geglu_backward": geglu[1]},
        "utils": {"calculate_settings": lambda width: (64, 4)},
    }
    modules = {"liger_kernel": ModuleType("liger_kernel"), "liger_kernel.ops": ModuleType("liger_kernel.ops")}
    for name, content in functions.items():
        modules[f"liger_kernel.ops.{name}"] = module = ModuleType(f"liger_kernel.ops.{name}")
        module.__dict__.update(content)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_with_these_arguments_pass_the_trial(dtype: torch.dtype):
    assert agrees(liger._kernels(), CPU, dtype)


@pytest.mark.usefixtures("package")
def test_gate_and_up_are_multiplied_before_they_are_written_over():
    generator = torch.Generator().manual_seed(1)
    gate, up, grad = (torch.randn(3, 8, generator=generator) for _ in range(3))
    expected = EAGER.gated_backward(grad.clone(), gate.clone(), up.clone(), "silu")
    for found, wanted in zip(liger._kernels().gated_backward(grad, gate, up, "silu"), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("package")
def test_an_activation_that_the_package_lacks_stays_the_engines():
    generator = torch.Generator().manual_seed(1)
    gate, up = (torch.randn(3, 8, generator=generator) for _ in range(2))
    assert torch.equal(liger._kernels().gated_forward(gate, up, "gelu"), EAGER.gated_forward(gate, up, "gelu"))
    assert liger._kernels().turn is EAGER.turn


@pytest.mark.parametrize(
    ("module", "function", "planted"),
    [
        ("rms_norm", "rms_norm_forward", lambda *args: (rms_norm_forward(*args)[0] * 1.001,)),
        ("rms_norm", "rms_norm_backward", lambda *args: rms_norm_backward(*args)[::-1]),
        ("rms_norm", "rms_norm_backward", lambda dY, X, W: None),
        ("swiglu", "swiglu_backward", lambda a, b, dc: (b, a)),
        ("geglu", "geglu_forward", lambda a, b: (a, b, torch.nn.functional.silu(a) * b)),
        ("utils", "calculate_settings", lambda width: 64),
    ],
    ids=["other numbers", "results swapped", "other arguments", "gradients swapped", "another activation", "other settings"],
)
def test_another_versions_kernels_are_passed_over(package: dict[str, ModuleType], module: str, function: str, planted: Callable):
    setattr(package[f"liger_kernel.ops.{module}"], function, planted)
    assert not agrees(liger._kernels(), CPU, torch.float32)


def test_without_the_package_or_a_gpu_there_are_none(monkeypatch: pytest.MonkeyPatch):
    assert liger_kernels(CPU, torch.bfloat16) is None
    monkeypatch.setattr(liger, "is_installed", lambda: False)
    liger_kernels.cache_clear()
    assert liger_kernels(torch.device("cuda:0"), torch.bfloat16) is None
    liger_kernels.cache_clear()


def test_a_package_without_these_modules_is_passed_over(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(liger, "is_installed", lambda: True)
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    liger_kernels.cache_clear()
    assert liger_kernels(torch.device("cuda:0"), torch.bfloat16) is None
    liger_kernels.cache_clear()
