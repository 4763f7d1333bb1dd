"""Which kernels a run computes with: a trial stands before the fused and the compiled ones, and whatever is in their way is passed over.

`torch.compile` is replaced: what is planted in its place fails, or gives other numbers, or none is wanted. Compiling for good takes
longer than all tests here.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from parity.forms import interpreted_triton

import giong.engine.compiled as compiled
import giong.engine.kernel_choice as kernel_choice
from giong.contracts import ScoreRequest
from giong.engine.compiled import missing_to_compile
from giong.engine.elementwise import EAGER, Kernels, kernels, rms_norm
from giong.engine.kernel_choice import agrees, compiled_that_serve, elementwise_of_run, fused_kernels
from giong.engine.score import LocalScorer
from giong.workflow.probing import training_speed

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture(autouse=True)
def ask_anew() -> Iterator[None]:
    cached = (fused_kernels, compiled.compiled_kernels, kernel_choice._compiled_that_serve)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize(("num_tokens", "width"), [(5, 64), (70, 24), (3, 2500), (1, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_fused_kernels_pass_the_trial(dtype: torch.dtype, num_tokens: int, width: int):
    """Fewer and more tokens than a program takes, narrow rows of which it takes several, widths that are no power of two."""
    assert agrees(interpreted_triton(), CPU, dtype, num_tokens, width)


def no_kernel(*arguments: object) -> None:
    raise ValueError("no compiler")


PLANTED: dict[str, dict[str, Callable]] = {
    "other numbers": {"norm_forward": lambda *given: EAGER.norm_forward(*given) * 1.001},
    "results swapped": {"gated_backward": lambda *given: EAGER.gated_backward(*given)[::-1]},
    "turned the other way": {"turn": lambda x, cos, sin, sign: EAGER.turn(x, cos, sin, -sign)},
    "no gradient": {"logprobs_and_gradient": lambda *given: EAGER.logprobs_and_gradient(*given[:-1], False)},
    "scale forgotten": {"add_product": lambda output, left, right, scale: EAGER.add_product(output, left, right, 1.0)},
    "another dtype": {"norm_forward": lambda *given: EAGER.norm_forward(*given).double()},
    "cannot be compiled": {"norm_backward": no_kernel},
}


@pytest.mark.parametrize("planted", PLANTED)
def test_kernels_that_give_something_else_are_passed_over(planted: str):
    assert agrees(EAGER, CPU, torch.float32)
    assert not agrees(dataclasses.replace(EAGER, **PLANTED[planted]), CPU, torch.float32)


def test_off_a_gpu_or_without_triton_there_are_none(monkeypatch: pytest.MonkeyPatch):
    assert fused_kernels(CPU, torch.bfloat16) is None
    monkeypatch.setattr(kernel_choice, "has_triton", lambda: False)
    assert fused_kernels(GPU, torch.bfloat16) is None


def test_a_triton_that_cannot_be_imported_is_passed_over(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel_choice, "has_triton", lambda: True)
    monkeypatch.setitem(sys.modules, "giong.engine.triton_kernels", None)
    assert fused_kernels(GPU, torch.bfloat16) is None


# ---- the compiled ones -----------------------------------------------------------------------------------------------


def refuses(function: Callable, **settings: object) -> Callable:
    raise RuntimeError("this Python cannot be compiled for")


def fails_when_called(function: Callable, **settings: object) -> Callable:
    return no_kernel


def of_other_numbers(function: Callable, **settings: object) -> Callable:
    return (lambda *given: function(*given) * 1.001) if function is compiled._norm_forward else function


BROKEN = (refuses, fails_when_called, of_other_numbers)


@pytest.fixture
def compile_calls(monkeypatch: pytest.MonkeyPatch) -> list[Callable]:
    """Functions that were compiled: as they are, and each calls itself."""
    calls: list[Callable] = []
    monkeypatch.setattr(torch, "compile", lambda function, **settings: calls.append(function) or function)
    monkeypatch.setattr(kernel_choice, "missing_to_compile", lambda device: None)
    return calls


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_kernels_that_pass_the_trial_are_in_use(tiny_model: Callable, compile_calls: list[Callable], dtype: str):
    model = tiny_model("qwen2", dtype=dtype).model
    with elementwise_of_run(model, compiled=True):
        assert kernels() is compiled.compiled_kernels()
    assert len(compile_calls) == 6
    assert kernels() is EAGER


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_compiler_that_is_broken_ends_no_run(
    tiny_model: Callable, compile_calls: list[Callable], monkeypatch: pytest.MonkeyPatch, broken
):
    monkeypatch.setattr(torch, "compile", broken)
    model = tiny_model("qwen2").model
    assert compiled_that_serve(model) is None
    with elementwise_of_run(model, compiled=True):
        assert kernels() is EAGER


def test_nothing_is_compiled_where_none_is_wanted_or_a_compiler_is_missing(
    tiny_model: Callable, compile_calls: list[Callable], monkeypatch: pytest.MonkeyPatch
):
    model = tiny_model("qwen2").model
    with elementwise_of_run(model, compiled=False):
        assert kernels() is EAGER
    monkeypatch.setattr(kernel_choice, "missing_to_compile", lambda device: "no compiler")
    assert compiled_that_serve(model) is None
    assert compile_calls == []


def test_the_trial_waits_for_the_models_own_activation_alone(
    tiny_model: Callable, compile_calls: list[Callable], monkeypatch: pytest.MonkeyPatch
):
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(kernel_choice, "agrees", lambda *given, activations: asked.append(activations) or True)
    assert compiled_that_serve(tiny_model("qwen2").model) is not None
    assert compiled_that_serve(tiny_model("gemma").model) is not None
    assert asked == [("silu",), ("gelu_pytorch_tanh",)]


def test_a_training_is_given_the_graphs_of_the_trial(compile_calls: list[Callable], monkeypatch: pytest.MonkeyPatch):
    """A graph is made anew for tensors that need a gradient, so none of those may reach it."""
    reached: list[bool] = []

    def watched(function: Callable, **settings: object) -> Callable:
        def call(*given: object) -> object:
            reached.extend(each.requires_grad for each in given if isinstance(each, torch.Tensor))
            return function(*given)

        return call

    monkeypatch.setattr(torch, "compile", watched)
    x, weight = torch.randn(3, 8, requires_grad=True), torch.nn.Parameter(torch.randn(8))
    with kernel_choice.use_kernels(compiled.compiled_kernels()):
        rms_norm(x, weight, epsilon=1e-6).square().sum().backward()
    assert x.grad is not None and weight.grad is not None
    assert reached and not any(reached)


def test_what_is_missing_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """A GPU beside it gives a CPU no compiler."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    assert "apt-get install g++" in missing_to_compile(CPU)
    monkeypatch.setattr(compiled, "has_triton", lambda: True)
    assert missing_to_compile(GPU) is None
    monkeypatch.setattr(compiled, "has_triton", lambda: False)
    assert "pip install triton" in missing_to_compile(GPU)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: name)
    monkeypatch.setattr(compiled.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "python3-dev" in missing_to_compile(CPU)
    (tmp_path / "Python.h").touch()
    assert missing_to_compile(CPU) is None


@pytest.mark.parametrize("measured", ["training speed", "scores"])
def test_what_is_measured_outside_a_run_computes_with_the_kernels_of_one(
    tiny_model: Callable, measured: str, monkeypatch: pytest.MonkeyPatch
):
    """Counting stand-ins for the fused kernels: the probe's speed is to be that of a run, forwards and backwards."""
    loaded, calls = tiny_model("llama"), Counter()

    def counted(name: str) -> Callable:
        return lambda *given: calls.update([name]) or getattr(EAGER, name)(*given)

    counting = Kernels(**{field.name: counted(field.name) for field in dataclasses.fields(Kernels)})
    run = {
        "training speed": lambda: training_speed(loaded, repeats=1),
        "scores": lambda: LocalScorer(loaded).score([ScoreRequest("The kettle sang.")])[0].logprobs,
    }[measured]
    expected = run()
    monkeypatch.setattr(kernel_choice, "fused_kernels", lambda device, dtype: counting)
    found = run()
    forwards, backwards = {"norm_forward", "turn", "gated_forward", "logprobs_and_gradient"}, {"norm_backward", "gated_backward"}
    assert set(calls) == (forwards if measured == "scores" else forwards | backwards)
    assert kernels() is EAGER
    if measured == "scores":
        assert found == expected
