"""The head is lean: it meets the positions with loss once, a chunk at a time, and keeps nothing as wide as the vocabulary.

None of this changes a number, so it is read from the operations that a step dispatches.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from test_laws import model_for
from test_packing import rows_of
from tiny_models import VOCAB_SIZE as V
from torch.utils._python_dispatch import TorchDispatchMode

import giong.engine.cross_entropy as cross_entropy
import giong.engine.step as step
from giong.engine.cross_entropy import Head, token_logprobs
from giong.engine.packing import Pack, pack
from giong.objectives import sft

LENGTHS = (5, 33, 17, 2, 26, 9, 40, 12)
CHUNK = 8
HELD_CHUNKS = 7
"""Logits and what their softmax and cap are computed in: a few, whatever the number of chunks."""


class VocabularyWide(TorchDispatchMode):
    """What is formed, multiplied, held and saved with as many columns as the vocabulary. Views are not new: the head's transpose is one."""

    def __init__(self) -> None:
        super().__init__()
        self.most_rows = self.rows_out = self.rows_in = self.most_held = self.saved = 0
        self._held: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if is_wide(result) and not func.is_view:
            self.most_rows = max(self.most_rows, result.numel() // V)
            storage = result.untyped_storage()
            self._held[id(storage)] = weakref.ref(storage)
            alive = {id(found): found for held in self._held.values() if (found := held()) is not None}
            self.most_held = max(self.most_held, sum(found.nbytes() for found in alive.values()))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            left = args[func.overloadpacket is torch.ops.aten.addmm]
            self.rows_out += len(result) if is_wide(result) else 0
            self.rows_in += len(left) if is_wide(left) else 0
        return result

    def save(self, tensor: torch.Tensor) -> torch.Tensor:
        self.saved += is_wide(tensor)
        return tensor


def is_wide(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[-1] == V


@contextmanager
def watched() -> Iterator[VocabularyWide]:
    found = VocabularyWide()
    with torch.autograd.graph.saved_tensors_hooks(found.save, lambda tensor: tensor), found:
        yield found


def not_lean(found: VocabularyWide, num_positions: int) -> set[str]:
    """What is wrong."""
    wrong = {
        "chunks": found.most_rows > CHUNK,
        "positions": found.rows_out != num_positions or found.rows_in != num_positions,
        "held": found.most_held > HELD_CHUNKS * CHUNK * V * 4,
        "saved": found.saved > 0,
    }
    return {name for name, is_wrong in wrong.items() if is_wrong}


def of_a_step(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    monkeypatch.setattr(cross_entropy, "CHUNK_POSITIONS", CHUNK)
    rows = rows_of(LENGTHS)
    with watched() as found:
        step.backward(model, rows, sft.loss, sum(LENGTHS))
    num_positions = sum(int((row.weights > 0).sum()) for row in rows)
    assert 8 * CHUNK < num_positions < sum(LENGTHS) - 3 * CHUNK, "several chunks, and positions enough without loss"
    return not_lean(found, num_positions)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_step_meets_the_vocabulary_only_where_there_is_loss(
    tiny_model: Callable, monkeypatch: pytest.MonkeyPatch, family: str, method: str
):
    """A head of its own, and a tied one with a cap."""
    assert of_a_step(model_for(tiny_model, family, method), monkeypatch) == set()


def test_log_probabilities_with_gradients_do_too(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    """Of an objective that announces no weights: a frozen head is enough for any function of them."""
    monkeypatch.setattr(cross_entropy, "CHUNK_POSITIONS", CHUNK)
    model, made = model_for(tiny_model, "llama", "lora"), pack(rows_of(LENGTHS))
    with watched() as found:
        step.forward_logprobs(model, made)["logprobs_N"].square().sum().backward()
    assert not_lean(found, len(made.targets_N)) == set()


# ---- planted: each gives the numbers of the engine ----------------------------------------------------------------------


def one_chunk(hidden_ND, weight_VD, bias_V):  # type: ignore[no-untyped-def]
    yield slice(0, len(hidden_ND)), hidden_ND @ weight_VD.T


def all_chunks_at_once(hidden_ND, weight_VD, bias_V):  # type: ignore[no-untyped-def]
    return [
        (slice(start, start + CHUNK), hidden_ND[start : start + CHUNK] @ weight_VD.T)
        for start in range(0, len(hidden_ND), CHUNK)
    ]  # fmt: skip


def selected_behind_the_head(model: torch.nn.Module, made: Pack) -> dict[str, torch.Tensor]:
    targets_T = torch.zeros_like(made.input_ids_T)
    targets_T[made.loss_positions_N] = made.targets_N
    weights_T = torch.zeros(len(targets_T))
    weights_T[made.loss_positions_N] = made.weights_N
    logprobs_T = token_logprobs(step.hidden_states(model, made), step.output_head(model), targets_T, weights_T)
    return {"logprobs_N": logprobs_T[made.loss_positions_N], "weights_N": made.weights_N, "row_of_N": made.row_of_N}


def left_to_autograd(hidden_ND: torch.Tensor, head: Head, targets_N: torch.Tensor, weights_N: torch.Tensor | None) -> torch.Tensor:
    parts = zip(hidden_ND.split(CHUNK), targets_N.split(CHUNK))
    return torch.cat([(part @ head.weight_VD.T).log_softmax(-1).gather(1, targets[:, None])[:, 0] for part, targets in parts])


def twice(hidden_ND: torch.Tensor, head: Head, targets_N: torch.Tensor, weights_N: torch.Tensor | None) -> torch.Tensor:
    return token_logprobs(hidden_ND, head, targets_N)


PLANTED = {
    "one chunk": (cross_entropy, "_chunks_of_logits", one_chunk, {"chunks", "held"}),
    "all chunks at once": (cross_entropy, "_chunks_of_logits", all_chunks_at_once, {"held"}),
    "selected behind the head": (step, "forward_logprobs", selected_behind_the_head, {"positions"}),
    "left to autograd": (step, "token_logprobs", left_to_autograd, {"held", "saved"}),
    "twice": (step, "token_logprobs", twice, {"positions"}),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_head_that_is_not_lean_is_seen(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch, planted: str):
    module, name, function, expected = PLANTED[planted]
    monkeypatch.setattr(module, name, function)
    assert of_a_step(model_for(tiny_model, "llama", "full"), monkeypatch) == expected
