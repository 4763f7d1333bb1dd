"""Lengths are brought to few, and what is added to reach them changes no number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from parity.tolerances import PLANTED_FACTOR, allowed

from giong.engine import cross_entropy, shapes
from giong.engine.cross_entropy import Head, token_logprobs
from giong.engine.divergence import token_kl
from giong.engine.shapes import LENGTH_MULTIPLE, padded, rounded

NUM_POSITIONS, WIDTH, VOCABULARY = 77, 32, 96


def test_few_lengths_come_out_and_little_is_added() -> None:
    assert [rounded(length) for length in (0, 1, 32, 33, 1024, 1025, 2048, 2049)] == [0, 32, 32, 64, 1024, 1088, 2048, 2176]
    for length in range(1, 10_000):
        assert length <= rounded(length) <= length + max(LENGTH_MULTIPLE - 1, length / 16)
        assert rounded(rounded(length)) == rounded(length)
    # A run whose packs differ twofold.
    assert len({rounded(length) for length in range(2049, 4097)}) == shapes.LENGTHS_PER_DOUBLING


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, the head's weight, targets and weights of positions."""
    generator = torch.Generator().manual_seed(3)
    hidden_ND = torch.randn(NUM_POSITIONS, WIDTH, generator=generator).to(dtype).requires_grad_(True)
    weight_VD = (torch.randn(VOCABULARY, WIDTH, generator=generator) * 0.3).to(dtype).requires_grad_(True)
    targets_N = torch.randint(VOCABULARY, (NUM_POSITIONS,), generator=generator)
    return hidden_ND, weight_VD, targets_N, torch.rand(NUM_POSITIONS, generator=generator) + 0.5


def by_head(announced: bool) -> list[torch.Tensor]:
    hidden_ND, weight_VD, targets_N, weights_N = inputs(torch.bfloat16)
    logprobs_N = token_logprobs(hidden_ND, Head(weight_VD), targets_N, weights_N if announced else None)
    return [logprobs_N.detach(), *torch.autograd.grad((weights_N * logprobs_N).sum(), (hidden_ND, weight_VD))]


def by_divergence() -> list[torch.Tensor]:
    hidden_ND, weight_VD, _, weights_N = inputs(torch.bfloat16)
    kl_N = token_kl(hidden_ND, Head(weight_VD), (hidden_ND * 0.7).detach(), Head(weight_VD.detach()))
    return [kl_N.detach(), *torch.autograd.grad((weights_N * kl_N).sum(), (hidden_ND, weight_VD))]


MADE = {"the weights announced": lambda: by_head(True), "any function": lambda: by_head(False), "the divergence": by_divergence}


def distance(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_positions_that_fill_up_change_no_number(made: Callable[[], list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    found = made()
    assert [len(part) for part in found] == [NUM_POSITIONS, NUM_POSITIONS, VOCABULARY]
    monkeypatch.setattr(shapes, "LENGTH_MULTIPLE", 1)
    assert distance(found, made()) < allowed("filled_up")


@pytest.mark.parametrize("announced", [True, False])
def test_filler_before_the_positions_is_seen(announced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = by_head(announced)

    def in_front(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor.new_zeros(-len(tensor) % LENGTH_MULTIPLE, *tensor.shape[1:]), tensor])

    monkeypatch.setattr(cross_entropy, "padded", in_front)
    assert distance(by_head(announced), wanted) > PLANTED_FACTOR * allowed("filled_up")


@pytest.mark.parametrize("announced", [True, False])
def test_products_with_the_head_come_in_few_shapes(announced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of positions; and where the weights are announced, the head still runs once."""
    true_mm, sizes, num_runs = torch.mm, set(), []

    def mm(left: torch.Tensor, right: torch.Tensor, **into: torch.Tensor) -> torch.Tensor:
        sizes.add(len(left))
        num_runs.append(right.shape == (WIDTH, VOCABULARY))
        return true_mm(left, right, **into)

    monkeypatch.setattr(torch, "mm", mm)
    by_head(announced)
    assert sum(num_runs) == (1 if announced else 2)
    generator = torch.Generator().manual_seed(4)
    for num_positions in range(1, 700, 7):
        hidden_ND = torch.randn(num_positions, WIDTH, generator=generator).bfloat16().requires_grad_(True)
        token_logprobs(hidden_ND, Head(torch.zeros(VOCABULARY, WIDTH).bfloat16()), torch.zeros(num_positions, dtype=torch.long))
    assert len(sizes) <= cross_entropy.CHUNK_POSITIONS // LENGTH_MULTIPLE
    assert all(size % LENGTH_MULTIPLE == 0 for size in sizes)


def test_nothing_is_added_where_there_is_nothing_to_add() -> None:
    full = torch.zeros(64, 3)
    assert padded(full) is full
    assert padded(torch.ones(33)).tolist() == [1.0] * 33 + [0.0] * 31
