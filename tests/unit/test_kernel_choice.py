"""Which kernels a run computes with: a trial stands before the fused ones, and whatever is in their way is passed over."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from parity.forms import interpreted_triton

import giong.engine.kernel_choice as kernel_choice
from giong.contracts import ScoreRequest
from giong.engine.elementwise import EAGER, Kernels, kernels
from giong.engine.kernel_choice import agrees, fused_kernels
from giong.engine.score import LocalScorer
from giong.workflow.probing import training_speed

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture(autouse=True)
def ask_anew() -> Iterator[None]:
    fused_kernels.cache_clear()
    yield
    fused_kernels.cache_clear()


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
