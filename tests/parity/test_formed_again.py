"""Adapted matrices behind a norm: its output is formed again for their backward pass, and that changes no number."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from parity.forms import interpreted_triton
from parity.tolerances import PLANTED_FACTOR, allowed, relative_error

from giong.engine.elementwise import EAGER, rms_norm, use_kernels
from giong.engine.lora_linear import LinearWeights, apply_linear

TOKENS, WIDTH, OUT, RANK, READERS = 11, 24, 16, 4, 3
EPSILON = 1e-3


@pytest.fixture(params=["eager", "in Triton"])
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_kernels(interpreted_triton() if request.param == "in Triton" else None):
        yield request.param


class Layer:
    """A norm whose output three adapted matrices read, as query, key and value do."""

    def __init__(self, dtype: torch.dtype = torch.float32, offset: float = 0.0, dropout: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(2)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.x, self.gain, self.offset = draw(1, TOKENS, WIDTH).requires_grad_(True), draw(WIDTH), offset
        self.weights = [
            LinearWeights(
                draw(OUT, WIDTH), None, draw(RANK, WIDTH).requires_grad_(True), draw(OUT, RANK).requires_grad_(True), 0.5, dropout
            )
            for _ in range(READERS)
        ]
        self.grads = [draw(1, TOKENS, OUT) for _ in range(READERS)]

    def outputs(self, *, formed_again: bool = True) -> list[torch.Tensor]:
        """A view of the norm's output does not know what it was formed from, and is kept."""
        normed = rms_norm(self.x, self.gain, epsilon=EPSILON, offset=self.offset)
        read = normed if formed_again else normed.view_as(normed)
        torch.manual_seed(0)
        return [apply_linear(read, weights) for weights in self.weights]

    def gradients(self, *, formed_again: bool = True) -> list[torch.Tensor]:
        leaves = [self.x, *(matrix for weights in self.weights for matrix in (weights.lora_a, weights.lora_b))]
        return list(torch.autograd.grad(self.outputs(formed_again=formed_again), leaves, self.grads))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_equal_to_the_bit(form: str, dtype: torch.dtype, offset: float, dropout: float):
    layer = Layer(dtype, offset, dropout)
    pairs = zip(layer.gradients(), layer.gradients(formed_again=False), strict=True)
    assert all(torch.equal(ours, kept) for ours, kept in pairs)


def test_another_constant_is_seen():
    layer = Layer()
    expected = layer.gradients(formed_again=False)
    outputs = layer.outputs()
    for output in outputs:
        output.grad_fn.next_functions[0][0].again.epsilon = 1.0
    found = torch.autograd.grad(outputs, [weights.lora_a for weights in layer.weights], layer.grads)
    assert relative_error(found[0], expected[1]) > PLANTED_FACTOR * allowed("elementwise")


@pytest.mark.parametrize("changed", ["x", "gain"])
def test_a_norm_whose_input_has_changed_since_is_refused(changed: str):
    layer = Layer()
    outputs = layer.outputs()
    with torch.no_grad():
        getattr(layer, changed).mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(outputs, [weights.lora_a for weights in layer.weights], layer.grads)


@pytest.mark.parametrize("change", [lambda normed: normed.mul_(2.0), lambda normed: normed.view(-1).add_(1.0)], ids=["itself", "a view"])
def test_an_output_that_was_changed_in_place_is_kept(change: Callable):
    """The norm would form it as it was; a reader before the change and one behind it see two tensors."""
    found = []
    for formed_again in (True, False):
        layer = Layer()
        normed = rms_norm(layer.x, layer.gain, epsilon=EPSILON)
        if not formed_again:
            normed = normed.view_as(normed)
        before = apply_linear(normed, layer.weights[0])
        if not formed_again:
            normed = normed.clone()
        change(normed)
        behind = apply_linear(normed, layer.weights[1])
        leaves = [layer.x, layer.weights[0].lora_a, layer.weights[1].lora_a]
        found.append(torch.autograd.grad([before, behind], leaves, layer.grads[:2]))
    assert all(torch.equal(ours, kept) for ours, kept in zip(*found, strict=True))


def kept_storages(run: Callable[[], object]) -> set[int]:
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        run()
    return {tensor.untyped_storage().data_ptr() for tensor in kept}


def test_the_norms_output_is_not_kept():
    layer = Layer()
    own = [layer.x, layer.gain, *(matrix for weights in layer.weights for matrix in weights[:4] if matrix is not None)]
    storages = {tensor.untyped_storage().data_ptr() for tensor in own}
    assert kept_storages(layer.outputs) == storages
    assert len(kept_storages(lambda: layer.outputs(formed_again=False)) - storages) == 1


def test_it_is_formed_once_for_all_its_readers_and_let_go_of():
    calls: list[int] = []

    def counted(*given: object) -> torch.Tensor:
        calls.append(1)
        return EAGER.norm_forward(*given)

    layer = Layer()
    with use_kernels(dataclasses.replace(EAGER, norm_forward=counted)):
        outputs = layer.outputs()
        again = {output.grad_fn.next_functions[0][0].again for output in outputs}
        assert (len(calls), [memory.num_readers for memory in again]) == (1, [READERS])
        leaves = [weights.lora_a for weights in layer.weights]
        first = torch.autograd.grad(outputs, leaves, layer.grads, retain_graph=True)
        assert (len(calls), [(memory.num_readers, memory.output_TD) for memory in again]) == (2, [(0, None)])
        # A second backward pass through the same graph forms it anew, and still lets go.
        second = torch.autograd.grad(outputs, leaves, layer.grads)
    assert [memory.output_TD for memory in again] == [None]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_gradients_nothing_is_remembered():
    layer = Layer()
    with torch.no_grad():
        assert not hasattr(rms_norm(layer.x, layer.gain, epsilon=EPSILON), "normed")
