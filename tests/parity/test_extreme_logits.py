"""The head on logits that fp32 shares cannot hold, and in chunks and slices of every size, against log_softmax in fp64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from parity.forms import interpreted_triton
from parity.tolerances import PLANTED_FACTOR, allowed
from torch.utils._python_dispatch import TorchDispatchMode

import giong.engine.cross_entropy as cross_entropy
import giong.engine.elementwise as elementwise
from giong.engine.cross_entropy import Head, token_logprobs
from giong.engine.elementwise import use_kernels

N, D, V = 9, 6, 40
HEADS = {"plain": (None, 1.0), "softcap": (300.0, 1.0), "scale": (None, 0.5), "softcap and scale": (300.0, 0.5)}
FEW = [None, (1, V), (4, 2 * V), (3, 10_000)]


@pytest.fixture(params=["eager", "in Triton"], autouse=True)
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each form of the head's softmax."""
    with use_kernels(interpreted_triton() if request.param == "in Triton" else None):
        yield request.param


class Inputs:
    """Every third position has a target whose share underflows fp32, one has a share that is a subnormal number."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(9)
        softcap, self.scale = HEADS[kind]
        self.hidden = torch.randn(N, D, generator=generator)
        weight = torch.randn(V, D, generator=generator)
        self.targets = torch.randint(1, V, (N,), generator=generator)
        # Token 0 is certain at these positions: its logit lies 80 to 800 above the others.
        weight[0] = 0.0
        weight[0, 0] = 40.0
        self.hidden[:, 0] = torch.tensor([9.0, 0.1, 0.2, 20.0, 0.0, -0.1, 5.0, 0.3, 2.4]) / self.scale
        self.hidden = self.hidden.to(dtype).requires_grad_(True)
        self.head = Head(weight.to(dtype).requires_grad_(True), torch.zeros(V, dtype=dtype, requires_grad=True), softcap, self.scale)
        self.weights = torch.rand(N, generator=generator) + 0.25

    def leaves(self) -> list[torch.Tensor]:
        return [self.hidden, self.head.weight_VD, self.head.bias_V]

    def found(self) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        logprobs = token_logprobs(self.hidden, self.head, self.targets, self.weights)
        return logprobs.detach(), torch.autograd.grad(-(self.weights * logprobs).sum(), self.leaves())

    def expected(self, planted: str | None = None) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        leaves = [leaf.detach().double().requires_grad_(True) for leaf in self.leaves()]
        logits = torch.nn.functional.linear(*leaves) * (1.0 if planted == "scale" else self.scale)
        if self.head.softcap is not None and planted != "softcap":
            logits = self.head.softcap * torch.tanh(logits / self.head.softcap)
        logprobs = logits.log_softmax(-1)[torch.arange(N), self.targets]
        return logprobs.detach(), torch.autograd.grad(-(self.weights.double() * logprobs).sum(), leaves)


def errors(inputs: Inputs, planted: str | None = None) -> tuple[float, float]:
    """(nats, gradients over the largest of their tensor)."""
    (logprobs, gradients), (wanted, wanted_gradients) = inputs.found(), inputs.expected(planted)
    assert logprobs.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    pairs = zip(gradients, wanted_gradients)
    return float((logprobs - wanted).abs().max()), max(float((left - right).abs().max() / right.abs().max()) for left, right in pairs)


@pytest.mark.parametrize("chunks", FEW, ids=["as shipped", "one by one", "four, in slices of two", "three"])
@pytest.mark.parametrize("kind", HEADS)
def test_a_share_that_underflows_has_a_logarithm(kind: str, chunks: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch):
    """Positions that underflow share chunks and slices with ones that do not."""
    if chunks:
        monkeypatch.setattr(cross_entropy, "CHUNK_POSITIONS", chunks[0])
        monkeypatch.setattr(elementwise, "SLICE_LOGITS", chunks[1])
    value, gradient = errors(Inputs(kind))
    assert value < allowed("extreme_logprobs")
    assert gradient < allowed("extreme_gradients")


def test_the_case_is_extreme():
    """In fp32 the logarithm of the share is minus infinity at some positions and of a subnormal number at another."""
    inputs = Inputs("plain")
    logits = torch.nn.functional.linear(inputs.hidden, inputs.head.weight_VD)
    shares = logits.softmax(-1).gather(1, inputs.targets[:, None])[:, 0]
    assert int((shares == 0).sum()) >= 3
    assert ((shares > 0) & (shares < torch.finfo(torch.float32).tiny)).any()
    assert float(inputs.found()[0].min()) < -300
    assert (shares > 1e-6).sum() >= 3


@pytest.mark.parametrize(("kind", "planted"), [("softcap", "softcap"), ("scale", "scale"), ("softcap and scale", "softcap")])
def test_a_forgotten_cap_or_scale_is_seen(kind: str, planted: str):
    value, gradient = errors(Inputs(kind), planted)
    assert value > PLANTED_FACTOR * allowed("extreme_logprobs")
    assert gradient > PLANTED_FACTOR * allowed("extreme_gradients")


def test_bf16_logits_underflow_as_well():
    inputs = Inputs("softcap", torch.bfloat16)
    (logprobs, gradients), (wanted, wanted_gradients) = inputs.found(), inputs.expected()
    assert logprobs.isfinite().all()
    # A bf16 logit of up to 800 is rounded by up to 2; capped at 300, by up to 1.
    assert float((logprobs - wanted).abs().max()) < 2.0
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(float((a.double() - b).norm() / b.norm()) < 0.05 for a, b in zip(gradients, wanted_gradients))


def test_a_trained_heads_gradient_waits_for_the_factor_of_the_loss():
    """The loss is divided by a weight that only the caller knows: twice the divisor is half the gradient, to the bit."""
    gradients = []
    for divisor in (3.0, 6.0):
        inputs = Inputs("softcap and scale")
        logprobs = token_logprobs(inputs.hidden, inputs.head, inputs.targets, inputs.weights)
        gradients.append(torch.autograd.grad(-(inputs.weights * logprobs).sum() / divisor, inputs.leaves()))
    assert all(torch.allclose(left, 2 * right, rtol=1e-6, atol=0) for left, right in zip(*gradients))


def test_scoring_with_a_head_that_is_trained_elsewhere_needs_no_weights_and_forms_no_gradient():
    """Rows are scored in the middle of full training: no_grad, parameters that require gradients, no loss to announce."""
    inputs, formed = Inputs("softcap and scale"), []

    class Formed(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape == (V, D) and not func.is_view:
                formed.append(func)
            return result

    with torch.no_grad(), Formed():
        logprobs = token_logprobs(inputs.hidden, inputs.head, inputs.targets)
    assert torch.equal(logprobs, inputs.found()[0])
    assert not formed
