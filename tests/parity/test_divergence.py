"""KL(reference || now) over the whole vocabulary: by hand, and against autograd on full logits in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from parity.test_cross_entropy import HEADS, Inputs
from parity.tolerances import PLANTED_FACTOR, allowed

from giong.engine import cross_entropy
from giong.engine.cross_entropy import Head
from giong.engine.divergence import token_kl


def by_hand(reverse: bool = False) -> tuple[float, float]:
    """Two tokens. Reference logits (0, 0): shares 1/2 and 1/2. Now (0, ln 3): shares 1/4 and 3/4.

    KL(reference || now) = 1/2 ln(2) + 1/2 ln(2/3) = 0.1438410; d/d(second logit) = 3/4 - 1/2 = 1/4, times the weight ln 3.
    """
    now, reference = torch.ones(1, 1, requires_grad=True), torch.zeros(1, 1)
    head = Head(torch.tensor([[0.0], [math.log(3)]]))
    kl_N = token_kl(*((reference.requires_grad_(), head, now.detach(), head) if reverse else (now, head, reference, head)))
    kl_N.sum().backward()
    return float(kl_N.detach()), float((reference if reverse else now).grad)


def test_by_hand():
    kl, gradient = by_hand()
    assert kl == pytest.approx(0.1438410, abs=allowed("hand_worked"))
    assert gradient == pytest.approx(math.log(3) / 4, abs=allowed("hand_worked"))


def test_the_other_direction_is_seen():
    assert abs(by_hand(reverse=True)[0] - 0.1438410) > PLANTED_FACTOR * allowed("hand_worked")


def differences(kind: str, planted: str | None = None) -> tuple[float, float]:
    """(nats, largest gradient) between the chunked divergence and autograd."""
    inputs = Inputs(kind)
    reference = torch.randn(inputs.hidden.shape, generator=torch.Generator().manual_seed(5))
    reference_head = Head(
        inputs.weight.detach() * 0.5, None if inputs.bias is None else inputs.bias.detach() + 1, inputs.softcap, inputs.scale
    )
    kl_N = token_kl(inputs.hidden, inputs.head, reference, reference_head)
    (inputs.weights * kl_N).sum().backward()

    def logprobs(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        logits = torch.nn.functional.linear(hidden, weight, bias) * inputs.scale
        if inputs.softcap is not None and planted != "softcap":
            logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
        return logits.log_softmax(-1)

    leaves = [leaf.detach().double().requires_grad_(True) for leaf in inputs.leaves()]
    fixed = [None if part is None else part.double() for part in (reference, reference_head.weight_VD, reference_head.bias_V)]
    now, then = logprobs(leaves[0], leaves[1], leaves[2] if len(leaves) > 2 else None), logprobs(*fixed)
    expected = (now.exp() * (now - then)).sum(1) if planted == "direction" else (then.exp() * (then - now)).sum(1)
    ((1.0 if planted == "weights" else inputs.weights.double()) * expected).sum().backward()
    gradients = [float((leaf.grad - other.grad).abs().max()) for leaf, other in zip(inputs.leaves(), leaves)]
    return float((kl_N - expected).detach().abs().max()), max(gradients)


@pytest.mark.parametrize("chunk", [256, 3])
@pytest.mark.parametrize("kind", HEADS)
def test_against_autograd(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_POSITIONS", chunk)
    kl, gradient = differences(kind)
    assert kl < allowed("token_logprobs")
    assert gradient < allowed("token_gradients")


@pytest.mark.parametrize(("planted", "kind"), [("direction", "plain"), ("softcap", "softcap"), ("weights", "bias")])
def test_a_planted_error_is_seen(planted: str, kind: str):
    assert differences(kind, planted)[1] > PLANTED_FACTOR * allowed("token_gradients")


def test_the_same_model_is_no_distance_away():
    inputs = Inputs("bias")
    kl_N = token_kl(inputs.hidden, inputs.head, inputs.hidden.detach(), inputs.head)
    kl_N.sum().backward()
    assert float(kl_N.abs().max()) < 1e-6
    assert all(float(leaf.grad.abs().max()) < 1e-6 for leaf in inputs.leaves())
