"""Gradients of every method on the engine's layers against plain transformers and autograd, one row at a time, where only a part moves.

A fast layer that took a gain, a bias or the head for frozen would give no gradient, or another one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from moving_parts import CASES, DIFFERENCES, pairs
from parity.tolerances import PLANTED_FACTOR, allowed
from test_laws import EIGHT, reference, trained_gradients
from test_packing import relative_difference, rows_of
from torch.nn.functional import gelu

import giong.engine.elementwise as elementwise
import giong.engine.gated_mlp as gated_mlp
from giong.engine.step import backward
from giong.methods import METHODS
from giong.models.bottleneck import Bottleneck
from giong.objectives import sft

MLP_BIAS = {"attention_bias": True, "mlp_bias": True}
"""Llama with biases: also in the matrix behind the gate, which the engine's MLP multiplies."""
CONFIGS = [(case, family, {}) for case, family in pairs(*DIFFERENCES)] + [
    ("bias", "llama", MLP_BIAS),
    ("bias", "neox", {}),
    ("norm", "neox", {}),
    ("lora, bias", "qwen2", {}),
    ("lora, bias", "llama", MLP_BIAS),
]


def moving(tiny_model: Callable, case: str, family: str, changes: dict) -> torch.nn.Module:
    return METHODS[CASES[case].name].apply(tiny_model(family, **changes).model, CASES[case]).model


def difference(model: torch.nn.Module) -> float:
    """Relative, the largest over all that moves; the loss has to be the same too."""
    rows = rows_of(EIGHT)
    expected_loss, expected = reference(model, rows)
    loss = backward(model, rows, sft.loss, 60)["loss"]
    assert loss == pytest.approx(expected_loss, abs=allowed("packed_logprobs"))
    found = trained_gradients(model)
    assert found.keys() == expected.keys()
    return relative_difference(found, expected)


@pytest.mark.parametrize(("case", "family", "changes"), CONFIGS)
def test_gradients_are_those_of_plain_autograd(tiny_model: Callable, case: str, family: str, changes: dict):
    assert difference(moving(tiny_model, case, family, changes)) < allowed("gradients")


def test_a_gain_that_forgets_a_row_is_seen(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    true = elementwise.norm_backward

    def forgetful(grad, x, gain, epsilon, needs_gain):  # type: ignore[no-untyped-def]
        of_x, _ = true(grad, x, gain, epsilon, needs_gain)
        return of_x, true(grad[1:], x[1:], gain, epsilon, needs_gain)[1]

    monkeypatch.setattr(elementwise, "_in_use", replace(elementwise.EAGER, norm_backward=forgetful))
    for family in ("llama", "qwen3", "gemma2"):
        assert difference(moving(tiny_model, "norm", family, {})) > PLANTED_FACTOR * allowed("gradients")


def test_a_bias_behind_the_gate_that_forgets_a_row_is_seen(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    true = gated_mlp.linear_backward

    def forgetful(grad, x, weights, needs, mask=None):  # type: ignore[no-untyped-def]
        found = true(grad, x, weights, needs, mask)
        return found._replace(bias=grad[1:].sum(0)) if found.bias is not None else found

    monkeypatch.setattr(gated_mlp, "linear_backward", forgetful)
    assert difference(moving(tiny_model, "bias", "llama", MLP_BIAS)) > PLANTED_FACTOR * allowed("gradients")


def with_moved_adapters(tiny_model: Callable, case: str, family: str) -> torch.nn.Module:
    """Otherwise they are the identity, and half of their gradients are zero."""
    model = moving(tiny_model, case, family, {})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bottleneck_adapter.up.weight"):
                parameter.normal_(0, 0.2)
    return model


@pytest.mark.parametrize(("case", "family"), [("bottleneck", "llama"), ("bottleneck, one", "gemma2"), ("bottleneck", "gpt2")])
def test_gradients_of_bottleneck_adapters_are_those_of_plain_autograd(tiny_model: Callable, case: str, family: str):
    assert difference(with_moved_adapters(tiny_model, case, family)) < allowed("gradients")


def test_an_adapter_that_passes_no_gradient_on_is_seen(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    """Planted in the engine's pass alone."""
    true = backward

    def cut(*arguments):  # type: ignore[no-untyped-def]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Bottleneck, "forward", lambda adapter, x: x + adapter.up(gelu(adapter.down(x.detach()))))
            return true(*arguments)

    monkeypatch.setitem(globals(), "backward", cut)
    assert difference(with_moved_adapters(tiny_model, "bottleneck", "llama")) > PLANTED_FACTOR * allowed("gradients")
