"""Chunked log-probabilities against autograd on full logits in fp64: values, gradients, chunks, and what must be refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from parity.forms import interpreted_triton
from parity.tolerances import PLANTED_FACTOR, allowed, relative_error

import giong.engine.cross_entropy as cross_entropy
from giong.engine.cross_entropy import Head, token_logprobs
from giong.engine.elementwise import use_kernels

N, D, V = 11, 6, 50
HEADS = {
    "plain": (None, 1.0, False),
    "bias": (None, 1.0, True),
    "softcap": (1.5, 1.0, False),
    "scale": (None, 0.3, True),
    "softcap and scale": (1.5, 0.3, True),
}


@pytest.fixture(params=["eager", "in Triton"], autouse=True)
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each form of the head's softmax."""
    with use_kernels(interpreted_triton() if request.param == "in Triton" else None):
        yield request.param


class Inputs:
    """Hidden states, head, targets and weights; `softcap` is low enough to bend logits of this size."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(7)
        self.softcap, self.scale, has_bias = HEADS[kind]
        self.hidden = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(True)
        self.weight = torch.randn(V, D, generator=generator, dtype=torch.float64).mul(0.7).to(dtype).requires_grad_(True)
        bias = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(True)
        self.bias = bias if has_bias else None
        self.targets = torch.randint(V, (N,), generator=generator)
        self.targets[3] = self.targets[5]
        self.weights = torch.rand(N, generator=generator) + 0.25

    @property
    def head(self) -> Head:
        return Head(self.weight, self.bias, self.softcap, self.scale)

    def leaves(self) -> list[torch.Tensor]:
        return [leaf for leaf in (self.hidden, self.weight, self.bias) if leaf is not None]

    def loss(self) -> torch.Tensor:
        return -(self.weights * token_logprobs(self.hidden, self.head, self.targets, self.weights)).sum() / 3


def by_autograd(inputs: Inputs, planted: str | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(log-probabilities, gradients of the weighted loss) in fp64 on all logits at once."""
    leaves = [leaf.detach().double().requires_grad_(True) for leaf in inputs.leaves()]
    logits = torch.nn.functional.linear(*leaves) * (1.0 if planted == "scale" else inputs.scale)
    if inputs.softcap is not None and planted != "softcap":
        logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
    targets = (inputs.targets + 1) % V if planted == "targets" else inputs.targets
    logprobs = logits.log_softmax(-1)[torch.arange(N), targets]
    weights = torch.ones(N) if planted == "weights" else inputs.weights
    (-(weights.double() * logprobs).sum() / 3).backward()
    return logprobs.detach(), [leaf.grad for leaf in leaves]


def differences(inputs: Inputs, planted: str | None = None) -> tuple[float, float]:
    """Largest difference of values, and of gradients."""
    expected, expected_gradients = by_autograd(inputs, planted)
    logprobs = token_logprobs(inputs.hidden, inputs.head, inputs.targets, inputs.weights)
    inputs.loss().backward()
    gradients = [leaf.grad.double() for leaf in inputs.leaves()]
    return (
        float((logprobs.detach().double() - expected).abs().max()),
        max(float((found - wanted).abs().max()) for found, wanted in zip(gradients, expected_gradients, strict=True)),
    )


@pytest.mark.parametrize("chunk_logits", [V, 3 * V, 10_000], ids=["one position", "three positions", "all at once"])
@pytest.mark.parametrize("kind", HEADS)
def test_values_and_gradients_equal_autograd_on_all_logits(kind: str, chunk_logits: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", chunk_logits)
    value, gradient = differences(Inputs(kind))
    assert value < allowed("token_logprobs")
    assert gradient < allowed("token_gradients")


@pytest.mark.parametrize(("kind", "planted"), [("plain", "targets"), ("softcap", "softcap"), ("scale", "scale"), ("plain", "weights")])
def test_a_planted_error_is_seen(kind: str, planted: str):
    value, gradient = differences(Inputs(kind), planted)
    assert gradient > PLANTED_FACTOR * allowed("token_gradients")
    assert planted == "weights" or value > PLANTED_FACTOR * allowed("token_logprobs")


@pytest.mark.parametrize("kind", HEADS)
def test_gradients_equal_finite_differences(kind: str):
    """(f(x + h) - f(x - h)) / 2h for a few numbers of every leaf."""
    inputs, step = Inputs(kind), 1e-2
    inputs.loss().backward()
    generator = torch.Generator().manual_seed(1)
    for leaf in inputs.leaves():
        flat = leaf.detach().view(-1)
        for index in torch.randint(flat.numel(), (5,), generator=generator).tolist():
            before = float(flat[index])
            flat[index] = before + step
            above = float(inputs.loss().detach())
            flat[index] = before - step
            below = float(inputs.loss().detach())
            flat[index] = before
            assert float(leaf.grad.view(-1)[index]) == pytest.approx((above - below) / (2 * step), abs=allowed("finite_differences"))


def test_hand_worked():
    """Two tokens, logits (1 * 1, 1 * -1) = (1, -1): log p(0) = 1 - log(e + 1/e) = -0.1269280; gradient (1 - p) W0 - (1 - p) W1 = 0.2384058."""
    hidden = torch.tensor([[1.0]], requires_grad=True)
    logprobs = token_logprobs(hidden, Head(torch.tensor([[1.0], [-1.0]])), torch.tensor([0]))
    logprobs.sum().backward()
    assert float(logprobs.detach()) == pytest.approx(-0.1269280, abs=allowed("hand_worked"))
    assert float(hidden.grad) == pytest.approx(0.2384058, abs=allowed("hand_worked"))


def squared_by_autograd(inputs: Inputs, first: int = 0) -> list[torch.Tensor]:
    """Gradients of the sum of squared log-probabilities, from position `first` on, in fp64 on all logits at once."""
    leaves = [leaf.detach().double().requires_grad_(True) for leaf in inputs.leaves()]
    logits = torch.nn.functional.linear(*leaves) * inputs.scale
    if inputs.softcap is not None:
        logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
    return list(torch.autograd.grad(logits.log_softmax(-1)[torch.arange(N), inputs.targets][first:].square().sum(), leaves))


def test_a_frozen_head_serves_any_function_of_the_log_probabilities():
    """A squared loss has another weight for every token, none of which is known beforehand."""
    inputs = Inputs("softcap")
    inputs.weight.requires_grad_(False)
    token_logprobs(inputs.hidden, inputs.head, inputs.targets).square().sum().backward()
    assert relative_error(inputs.hidden.grad, squared_by_autograd(inputs)[0]) < allowed("squared_gradients")
    assert relative_error(inputs.hidden.grad, squared_by_autograd(inputs, first=1)[0]) > PLANTED_FACTOR * allowed("squared_gradients")


def test_masked_tokens_have_no_gradient():
    inputs = Inputs("plain")
    inputs.weight.requires_grad_(False)
    inputs.weights[[2, 5]] = 0.0
    inputs.loss().backward()
    assert inputs.hidden.grad[[2, 5]].abs().max() == 0
    assert inputs.hidden.grad[[0, 1, 3, 4]].abs().sum(1).min() > 0


@pytest.mark.parametrize("announced", [True, False], ids=["another loss than announced", "nothing announced"])
@pytest.mark.parametrize("kind", ["bias", "softcap and scale"])
def test_a_trained_head_serves_any_function_of_the_log_probabilities(kind: str, announced: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_POSITIONS", 4)
    inputs = Inputs(kind)
    token_logprobs(inputs.hidden, inputs.head, inputs.targets, inputs.weights if announced else None).square().sum().backward()
    for leaf, wanted, forgotten in zip(inputs.leaves(), squared_by_autograd(inputs), squared_by_autograd(inputs, first=1), strict=True):
        assert relative_error(leaf.grad, wanted) < allowed("squared_gradients")
        assert relative_error(leaf.grad, forgotten) > PLANTED_FACTOR * allowed("squared_gradients")


def test_bf16_gradients_keep_their_dtype_and_stay_near():
    inputs = Inputs("plain", torch.bfloat16)
    logprobs = token_logprobs(inputs.hidden, inputs.head, inputs.targets, inputs.weights)
    assert logprobs.dtype == torch.float32
    inputs.loss().backward()
    _, expected = by_autograd(inputs)
    for leaf, wanted in zip(inputs.leaves(), expected, strict=True):
        assert leaf.grad.dtype == torch.bfloat16
        # bf16 keeps 8 bits: 2^-8 = 0.004 of numbers up to about 2.
        assert float((leaf.grad.double() - wanted).abs().max()) < 0.02
