"""RMS norm, rotary positions and the gated MLP against transformers' own modules and plain autograd; eager,
written for a compiler, and in Triton.

The compiled kernels are tested uncompiled: the formulas are the same, and compiling them takes longer than all tests here. Triton's
are interpreted where there is no GPU; on one, test_cuda.py runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from parity.forms import interpreted_triton
from parity.tolerances import PLANTED_FACTOR, allowed, relative_error
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import giong.engine.compiled as compiled
import giong.engine.elementwise as elementwise
from giong.engine.elementwise import ACTIVATIONS, EAGER, Kernels, rms_norm, rotary, use_kernels
from giong.engine.gated_mlp import gated_down
from giong.engine.lora_dropout import draw_dropout, dropped
from giong.engine.lora_linear import LinearWeights

NORMS = {
    "llama": (LlamaRMSNorm, 0.0),
    "mistral": (MistralRMSNorm, 0.0),
    "qwen2": (Qwen2RMSNorm, 0.0),
    "qwen3": (Qwen3RMSNorm, 0.0),
    "gemma": (GemmaRMSNorm, 1.0),
    "gemma2": (Gemma2RMSNorm, 1.0),
}
EPSILON = 1e-3
WIDTH = 24

FORMS = ("eager", "eager, in slices", "for a compiler", "in Triton")
BF16_TOLERANCE = dict.fromkeys(FORMS, "bf16_error_ratio") | {"in Triton": "bf16_interpreted_error_ratio"}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each form of the kernels; slices are as small as three tokens."""
    kernels: Kernels = EAGER
    if request.param == "eager, in slices":
        monkeypatch.setattr(elementwise, "SLICE_ELEMENTS", 3 * WIDTH)
    if request.param == "for a compiler":
        monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
        kernels = compiled.compiled_kernels.__wrapped__()
    if request.param == "in Triton":
        kernels = interpreted_triton()
    with use_kernels(kernels):
        yield request.param


def error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(relative_error(left, right) for left, right in zip(found, expected, strict=True))


def distances(found: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    """Of whole tensors, not of their worst numbers: rounding is a matter of chance in one of them."""
    return [float((left.double() - right).norm() / right.norm()) for left, right in zip(found, expected, strict=True)]


def assert_no_worse(
    found: list[torch.Tensor], peer: list[torch.Tensor], exact: list[torch.Tensor], tolerance: str = "bf16_error_ratio"
) -> None:
    for ours, theirs in zip(distances(found, exact), distances(peer, exact)):
        assert ours < allowed(tolerance) * theirs


# ---- RMS norm --------------------------------------------------------------------------------------------------------


class NormInputs:
    """Tokens of very unlike size, among them one that epsilon decides; gains far from one."""

    def __init__(self, family: str, shape: tuple[int, ...] = (1, 11, WIDTH), dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(3)
        kind, self.offset = NORMS[family]
        self.module = kind(shape[-1], eps=EPSILON).to(dtype)
        sizes = torch.logspace(-2, 2, shape[1]).view(1, -1, *[1] * (len(shape) - 2))
        self.x = (torch.randn(shape, generator=generator) * sizes).to(dtype).requires_grad_(True)
        self.grad = torch.randn(shape, generator=generator).to(dtype)
        with torch.no_grad():
            self.module.weight.copy_(torch.randn(shape[-1], generator=generator) * 0.5 + 0.8)

    def to(self, device: torch.device) -> None:
        self.module.to(device)
        self.x, self.grad = self.x.detach().to(device).requires_grad_(True), self.grad.to(device)

    def by_transformers(self) -> list[torch.Tensor]:
        output = self.module(self.x)
        return [output.detach(), *torch.autograd.grad(output, [self.x, self.module.weight], self.grad)]

    def by_giong(self, epsilon: float = EPSILON, offset: float | None = None) -> list[torch.Tensor]:
        output = rms_norm(self.x, self.module.weight, epsilon=epsilon, offset=self.offset if offset is None else offset)
        return [output.detach(), *torch.autograd.grad(output, [self.x, self.module.weight], self.grad)]

    def exact(self) -> list[torch.Tensor]:
        x, weight = (tensor.detach().double().requires_grad_(True) for tensor in (self.x, self.module.weight))
        output = x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * (weight + self.offset)
        return [output.detach(), *torch.autograd.grad(output, [x, weight], self.grad.double())]


@pytest.mark.parametrize("shape", [(1, 11, WIDTH), (1, 11, 3, WIDTH)], ids=["hidden states", "heads"])
@pytest.mark.parametrize("family", NORMS)
def test_the_norm_and_its_gradients_are_those_of_transformers(form: str, family: str, shape: tuple[int, ...]):
    inputs = NormInputs(family, shape)
    assert error(inputs.by_giong(), inputs.by_transformers()) < allowed("elementwise")


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize(("setting", "value"), [("epsilon", 0.0), ("offset", 0.5)])
def test_a_norm_with_another_constant_is_seen(form: str, family: str, setting: str, value: float):
    inputs = NormInputs(family)
    found, expected = inputs.by_giong(**{setting: value}), inputs.by_transformers()
    assert all(relative_error(left, right) > PLANTED_FACTOR * allowed("elementwise") for left, right in zip(found[:2], expected[:2]))


def test_a_gradient_that_takes_the_root_mean_square_for_a_constant_is_seen():
    """dx = r g dy is what is left when the pull of the mean is forgotten."""
    inputs = NormInputs("llama")
    x = inputs.x.detach()
    constant = (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * inputs.module.weight * inputs.grad
    assert relative_error(constant, inputs.by_transformers()[1]) > PLANTED_FACTOR * allowed("elementwise")


@pytest.mark.parametrize("family", NORMS)
def test_in_bf16_the_norm_is_as_exact_as_in_transformers(form: str, family: str):
    inputs = NormInputs(family, (1, 64, 96), torch.bfloat16)
    found = inputs.by_giong()
    assert [figure.dtype for figure in found] == [torch.bfloat16] * 3
    assert_no_worse(found, inputs.by_transformers(), inputs.exact(), BF16_TOLERANCE[form])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_leaves_its_inputs_as_they_were(form: str, dtype: torch.dtype):
    """In fp32 nothing is copied on the way to fp32, so an in-place step would write over the residual stream, or over a
    gradient that another branch still needs."""
    inputs = NormInputs("gemma2", dtype=dtype)
    x, weight, grad = inputs.x.detach().clone(), inputs.module.weight.detach().clone(), inputs.grad.clone()
    inputs.by_giong()
    assert torch.equal(inputs.x, x)
    assert torch.equal(inputs.module.weight, weight)
    assert torch.equal(inputs.grad, grad)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_residual_stream_around_a_norm(form: str, offset: float):
    """x + norm(x), as in Gemma 2: autograd hands the same gradient tensor to both branches."""
    inputs = NormInputs("gemma2" if offset else "llama")
    gradients = []
    for norm in (lambda x: rms_norm(x, inputs.module.weight, epsilon=EPSILON, offset=offset), inputs.module):
        output = inputs.x + norm(inputs.x)
        gradients.append([output.detach(), *torch.autograd.grad(output.sum(), [inputs.x, inputs.module.weight])])
    assert error(*gradients) < allowed("elementwise")


def test_a_frozen_gain_gets_no_gradient(form: str):
    inputs = NormInputs("llama")
    inputs.module.weight.requires_grad_(False)
    rms_norm(inputs.x, inputs.module.weight, epsilon=EPSILON).backward(inputs.grad)
    assert inputs.module.weight.grad is None
    assert relative_error(inputs.x.grad, inputs.exact()[1]) < allowed("elementwise")


# ---- rotary positions ------------------------------------------------------------------------------------------------


class RotaryInputs:
    """Queries as a projection leaves them: (1, H, T, E) seen through a transposition."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(4)
        self.x = torch.randn(1, 11, 3, 8, generator=generator).to(dtype).transpose(1, 2).requires_grad_(True)
        self.grad = torch.randn(1, 11, 3, 8, generator=generator).to(dtype).transpose(1, 2)
        angles = (torch.randn(1, 11, 4, generator=generator) * 3).repeat(1, 1, 2)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def figures(self, turn: Callable, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        x, cos, sin, grad = (tensor.detach().to(dtype or tensor.dtype) for tensor in (self.x, self.cos, self.sin, self.grad))
        output = turn(x.requires_grad_(True), cos, sin)
        return [output.detach(), *torch.autograd.grad(output, [x], grad)]

    @staticmethod
    def by_transformers(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return apply_rotary_pos_emb(x, x.detach(), cos, sin)[0]


def test_rotation_and_its_gradient_are_those_of_transformers(form: str):
    inputs = RotaryInputs()
    assert error(inputs.figures(rotary), inputs.figures(inputs.by_transformers)) < allowed("elementwise")


PLANTED_ROTATIONS: dict[str, Callable] = {
    "turned back": lambda x, cos, sin: rotary(x, cos, -sin),
    "one position late": lambda x, cos, sin: rotary(x, cos.roll(1, 1), sin.roll(1, 1)),
    "neighbouring pairs": lambda x, cos, sin: rotary(x.unflatten(-1, (4, 2)).mT.flatten(-2), cos, sin).unflatten(-1, (2, 4)).mT.flatten(-2),
}


@pytest.mark.parametrize("planted", PLANTED_ROTATIONS)
def test_another_rotation_is_seen(form: str, planted: str):
    inputs = RotaryInputs()
    found, expected = inputs.figures(PLANTED_ROTATIONS[planted]), inputs.figures(inputs.by_transformers)
    assert all(relative_error(left, right) > PLANTED_FACTOR * allowed("elementwise") for left, right in zip(found, expected))


def test_in_bf16_rotation_is_as_exact_as_in_transformers(form: str):
    inputs = RotaryInputs(torch.bfloat16)
    exact = inputs.figures(inputs.by_transformers, torch.float64)
    assert_no_worse(inputs.figures(rotary), inputs.figures(inputs.by_transformers), exact)


def test_rotation_keeps_lengths_and_its_inputs(form: str):
    inputs = RotaryInputs()
    before = inputs.x.detach().clone()
    output, gradient = inputs.figures(rotary)
    assert relative_error(output.norm(dim=-1), before.norm(dim=-1)) < allowed("elementwise")
    assert relative_error(gradient.norm(dim=-1), inputs.grad.norm(dim=-1)) < allowed("elementwise")
    assert torch.equal(inputs.x, before)


# ---- gated MLP -------------------------------------------------------------------------------------------------------

TOKENS, INNER, OUT, RANK = 13, 24, 20, 8


class MlpInputs:
    """Gate, up and the down projection, with bias and update or without."""

    def __init__(self, *, bias: bool = True, update: bool = True, dtype: torch.dtype = torch.float32, width: int = INNER) -> None:
        generator = torch.Generator().manual_seed(6)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype).requires_grad_(True)

        self.gate, self.up, self.grad = draw(1, TOKENS, width), draw(1, TOKENS, width), draw(1, TOKENS, OUT).detach()
        weight, vector, lora_a, lora_b = draw(OUT, width), draw(OUT), draw(RANK, width), draw(OUT, RANK)
        self.weights = LinearWeights(weight, vector if bias else None, *((lora_a, lora_b, 0.7) if update else ()))

    def leaves(self) -> list[torch.Tensor]:
        return [self.gate, self.up, *(tensor for tensor in self.weights[:4] if tensor is not None)]

    def by_giong(self, activation: str) -> list[torch.Tensor]:
        output = gated_down(self.gate, self.up, self.weights, activation)
        return [output.detach(), *torch.autograd.grad(output, self.leaves(), self.grad)]

    def by_autograd(self, activation: str, dtype: torch.dtype | None = None, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
        dtype = dtype or self.gate.dtype
        leaves = [leaf.detach().to(dtype).requires_grad_(True) for leaf in self.leaves()]
        gate, up, weight, *rest = leaves
        hidden = ACT2FN[activation](gate) * up
        bias = rest.pop(0) if self.weights.bias is not None else None
        output = torch.nn.functional.linear(hidden, weight, bias)
        if rest:
            dropped = hidden if mask is None else hidden * mask
            output = output + dropped @ rest[0].T @ rest[1].T * self.weights.scale
        return [output.detach(), *torch.autograd.grad(output, leaves, self.grad.to(dtype))]


@pytest.mark.parametrize(("bias", "update"), list(product([False, True], repeat=2)))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gated_mlp_is_that_of_autograd(form: str, activation: str, bias: bool, update: bool):
    inputs = MlpInputs(bias=bias, update=update)
    assert error(inputs.by_giong(activation), inputs.by_autograd(activation)) < allowed("gated_mlp")


@pytest.mark.parametrize(("used", "meant"), [("silu", "gelu"), ("gelu", "gelu_pytorch_tanh"), ("gelu_pytorch_tanh", "silu")])
def test_another_activation_is_seen(form: str, used: str, meant: str):
    """Also the near ones: GELU and its approximation by tanh."""
    inputs = MlpInputs()
    assert error(inputs.by_giong(used), inputs.by_autograd(meant)) > PLANTED_FACTOR * allowed("gated_mlp")


def test_gate_and_up_the_wrong_way_round_are_seen(form: str):
    inputs, swapped = MlpInputs(), MlpInputs()
    swapped.gate, swapped.up = inputs.up, inputs.gate
    assert error(swapped.by_giong("silu"), inputs.by_autograd("silu")) > PLANTED_FACTOR * allowed("gated_mlp")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_in_bf16_the_gated_mlp_is_as_exact_as_plain_autograd(form: str, activation: str):
    inputs = MlpInputs(dtype=torch.bfloat16, width=96)
    found = inputs.by_giong(activation)
    assert all(figure.dtype == torch.bfloat16 for figure in found)
    assert_no_worse(found, inputs.by_autograd(activation), inputs.by_autograd(activation, torch.float64), BF16_TOLERANCE[form])


def test_dropout_meets_the_update_alone_and_is_the_same_backward(form: str, monkeypatch: pytest.MonkeyPatch):
    inputs = MlpInputs()
    inputs.weights = inputs.weights._replace(dropout=0.4)
    drawn, ones = draw_dropout(0.4), torch.ones(TOKENS, INNER)
    mask = dropped(ones, drawn.mask(ones)) * drawn.scale
    monkeypatch.setattr("giong.engine.gated_mlp.draw_dropout", lambda probability: drawn if probability == 0.4 else None)
    found = inputs.by_giong("silu")
    assert error(found, inputs.by_autograd("silu", mask=mask)) < allowed("gated_mlp")
    assert error(found, inputs.by_autograd("silu")) > PLANTED_FACTOR * allowed("gated_mlp")


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (4,), (5,), (0, 1), (4, 5), (0, 2, 3)])
def test_any_part_may_be_frozen(form: str, wanted: tuple[int, ...]):
    """Leaves in the order gate, up, W, b, A, B."""
    inputs = MlpInputs()
    expected = inputs.by_autograd("silu")[1:]
    leaves = inputs.leaves()
    for index, leaf in enumerate(leaves):
        leaf.requires_grad_(index in wanted)
    gated_down(inputs.gate, inputs.up, inputs.weights, "silu").backward(inputs.grad)
    for index, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (index in wanted)
        assert leaf.grad is None or relative_error(leaf.grad, expected[index]) < allowed("gated_mlp")


def test_gate_and_up_are_left_as_they_were_and_are_all_that_is_kept(form: str):
    inputs, kept = MlpInputs(), []
    before = [leaf.detach().clone() for leaf in [*inputs.leaves(), inputs.grad]]
    inputs.by_giong("gelu")
    assert all(torch.equal(leaf, copy) for leaf, copy in zip([*inputs.leaves(), inputs.grad], before))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        gated_down(inputs.gate, inputs.up, inputs.weights, "silu")
    assert {tensor.data_ptr() for tensor in kept} == {leaf.data_ptr() for leaf in inputs.leaves()}
