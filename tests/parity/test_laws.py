"""Laws of a training step: how the rows are cut up changes neither loss nor gradients.

Every law is a set of ways to compute one step. The reference is plain transformers, one row at a time, full logits; so two ways that
agree with it agree with each other. Under each planted error every law must fail.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from parity.forms import interpreted_triton
from parity.tolerances import PLANTED_FACTOR, allowed
from test_packing import gradients, logprobs_one_by_one, relative_difference, rows_of
from tiny_models import VOCAB_SIZE

import giong.engine.cross_entropy as cross_entropy
import giong.engine.elementwise as elementwise
import giong.engine.row_attention as row_attention
import giong.engine.shapes as shapes
import giong.engine.step as step
import giong.sizing.lanes as lanes
from giong.config import MethodConfig
from giong.contracts import LossSum
from giong.engine.packing import Pack
from giong.engine.step import backward
from giong.methods import METHODS
from giong.models.rows import Row
from giong.objectives import sft

EIGHT = (5, 33, 17, 2, 26, 9, 40, 12)
ALL, ONE_ROW = sum(EIGHT), 1


@dataclass(frozen=True)
class Way:
    """One way to compute the step: rows in an order, so many tokens per pass, module constants changed."""

    order: tuple[int, ...] = tuple(range(8))
    max_tokens: int = ALL
    constants: dict[tuple[object, str], object] = field(default_factory=dict)


HEAD = {
    (cross_entropy, "CHUNK_POSITIONS"): (1, 7, 64),
    (cross_entropy, "CHUNK_LOGITS"): (1, 5 * VOCAB_SIZE),
    (elementwise, "SLICE_LOGITS"): (1, 3 * VOCAB_SIZE),
}
TWO_LANES = {(lanes, "MIN_NUMBERS"): 0, (lanes, "MOVING_SHARE"): 1.0, (torch, "get_num_threads"): lambda: 2}
LAWS: dict[str, list[Way]] = {
    "packing": [Way(max_tokens=tokens) for tokens in (ALL, 60, 45)],
    "batch order": [Way(order=order, max_tokens=60) for order in ((7, 6, 5, 4, 3, 2, 1, 0), (3, 6, 0, 1, 7, 4, 2, 5))],
    "accumulation: 1 x 8 = 8 x 1": [Way(max_tokens=ALL), Way(max_tokens=ONE_ROW)],
    "chunks of the head": [Way(constants={constant: value}) for constant, values in HEAD.items() for value in values],
    "blocks of attention": [
        Way(constants={(row_attention, "BLOCK_QUERIES"): 8}),
        Way(constants={(row_attention, "BLOCK_QUERIES"): 3, (row_attention, "MAX_SCORES"): 500, (shapes, "LENGTH_MULTIPLE"): 1}),
        Way(constants={(row_attention, "MAX_SCORES"): 1}),
        Way(constants={(row_attention, "MAX_PADDING"): 3, (shapes, "LENGTH_MULTIPLE"): 4}),
    ],
    "passes side by side": [Way(max_tokens=tokens, constants=TWO_LANES) for tokens in (2 * ALL, 100)],
    "slices of element-wise work": [Way(constants={(elementwise, "SLICE_ELEMENTS"): value}) for value in (1, 700)],
}


def clear_plans() -> None:
    row_attention.plan_groups.cache_clear()
    row_attention._mask.cache_clear()


@contextmanager
def constants_of(way: Way) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), value in way.constants.items():
            patch.setattr(module, name, value)
        clear_plans()
        yield
    clear_plans()


def model_for(tiny_model: Callable, family: str, method: str) -> torch.nn.Module:
    """Everything trained, or a LoRA update that is not zero."""
    model = tiny_model(family).model
    if method == "full":
        return model.requires_grad_(True)
    model = METHODS["lora"].apply(model, MethodConfig(name="lora", lora_r=4, lora_alpha=8.0, lora_dropout=0.0), seed=1).model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    return model


def trained_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    model.zero_grad()
    return found


def reference(model: torch.nn.Module, rows: Sequence[Row]) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, gradients) of plain transformers and PEFT."""
    losses = [
        -(logprobs * torch.from_numpy(row.weights[row.weights > 0])).sum() for logprobs, row in zip(logprobs_one_by_one(model, rows), rows)
    ]
    loss = sum(losses) / sum(float(row.weights.sum()) for row in rows)
    loss.backward()
    return float(loss.detach()), trained_gradients(model)


def rows_see_each_other(made: Pack) -> Pack:
    return replace(made, lengths=(sum(made.lengths),))


def mask_shifted(made: Pack) -> Pack:
    """Each prediction is taken from the position of its own target."""
    return replace(made, loss_positions_N=made.loss_positions_N + 1)


def row_dropped(made: Pack) -> Pack:
    """The first row of a pack carries no loss, but is still counted."""
    kept = made.row_of_N > 0
    names = ("loss_positions_N", "targets_N", "weights_N", "row_of_N")
    return replace(made, **{name: getattr(made, name)[kept] for name in names}) if kept.any() else made


def mean_of_the_pass(tensors: dict[str, torch.Tensor]) -> LossSum:
    """The scale of a loop that averages over each pass and forgets how much each weighs."""
    made = sft.loss(tensors)
    return LossSum(made.loss_sum / made.weight_sum, made.weight_sum)


PLANTED: dict[str, Callable[[Pack], Pack]] = {
    "rows see each other": rows_see_each_other,
    "mask shifted": mask_shifted,
    "row dropped": row_dropped,
    "wrong scale": lambda made: made,
}


def plant_in_packs(patch: pytest.MonkeyPatch, planted: str) -> None:
    """Every pack of a step gets this error."""
    true_pack = step.pack
    patch.setattr(step, "pack", lambda members: PLANTED[planted](true_pack(members)))


def largest_difference(
    model: torch.nn.Module, ways: Sequence[Way], planted: str | None = None, lengths: tuple[int, ...] = EIGHT
) -> tuple[float, float]:
    """(nats of loss, relative gradient) between the reference and the ways of a law."""
    rows = rows_of(lengths)
    expected_loss, expected = reference(model, rows)
    objective = mean_of_the_pass if planted == "wrong scale" else sft.loss
    losses, apart = [], []
    for way in ways:
        with constants_of(way), pytest.MonkeyPatch.context() as patch:
            if planted:
                plant_in_packs(patch, planted)
            loss = backward(model, [rows[index] for index in way.order], objective, way.max_tokens)["loss"]
        losses.append(abs(loss - expected_loss))
        apart.append(relative_difference(trained_gradients(model), expected))
    return max(losses), max(apart)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral", "gpt2"])
@pytest.mark.parametrize("law", LAWS)
def test_loss_and_gradients_do_not_change(tiny_model: Callable, law: str, family: str, method: str):
    loss, gradient = largest_difference(model_for(tiny_model, family, method), LAWS[law])
    assert loss < allowed("packed_logprobs")
    assert gradient < allowed("gradients")


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("law", LAWS)
def test_every_law_fails_under_every_planted_error(tiny_model: Callable, law: str, planted: str, method: str):
    loss, gradient = largest_difference(model_for(tiny_model, "llama", method), LAWS[law], planted)
    assert loss > PLANTED_FACTOR * allowed("packed_logprobs")
    assert gradient > PLANTED_FACTOR * allowed("gradients")


# Triton's interpreter takes its time: three rows, all in one pass and in two.
FEW = (5, 17, 9)
FEW_WAYS = [Way(order=(0, 1, 2), max_tokens=tokens) for tokens in (sum(FEW), 20)]


def test_packing_changes_nothing_in_the_kernels_of_a_gpu_either(tiny_model: Callable):
    """A whole step: norms, rotary positions, gated activations, the update's product and the head's softmax by Triton."""
    with elementwise.use_kernels(interpreted_triton()):
        loss, gradient = largest_difference(model_for(tiny_model, "llama", "lora"), FEW_WAYS, lengths=FEW)
    assert loss < allowed("packed_logprobs")
    assert gradient < allowed("gradients")


@pytest.mark.parametrize("planted", ["rows see each other", "turned the other way"])
def test_an_error_beside_them_or_in_one_of_them_is_seen(tiny_model: Callable, planted: str):
    kernels = interpreted_triton()
    if planted not in PLANTED:
        kernels = replace(kernels, turn=lambda x, cos, sin, sign: interpreted_triton().turn(x, cos, sin, -sign))
    in_packs = planted if planted in PLANTED else None
    with elementwise.use_kernels(kernels):
        loss, gradient = largest_difference(model_for(tiny_model, "llama", "lora"), FEW_WAYS, in_packs, FEW)
    assert loss > PLANTED_FACTOR * allowed("packed_logprobs")
    assert gradient > PLANTED_FACTOR * allowed("gradients")


def test_the_ways_of_a_law_are_different_ways(monkeypatch: pytest.MonkeyPatch):
    """The constants are small enough for the rows above: several passes, chunks, blocks, slices."""
    from giong.engine.packing import plan_packs

    assert [len(plan_packs(EIGHT, tokens)) for tokens in (ALL, 60, 45, ONE_ROW)] == [1, 3, 4, 8]
    num_positions = sum(int((row.weights > 0).sum()) for row in rows_of(EIGHT))
    assert num_positions > 64
    groups = []
    for way in [Way(), *LAWS["blocks of attention"]]:
        with constants_of(way):
            groups.append(([len(group.rows) for group in row_attention.plan_groups(EIGHT, 4)], len(row_attention._blocks(33, None))))
    assert len({str(group) for group in groups}) >= 4
    assert [number for _, number in groups] == [1, 5, 11, 1, 1]


def test_the_graph_of_a_pass_is_gone_before_the_next_one(tiny_model: Callable):
    """Its thousands of small pieces lie between the activations: kept, they cost a step of several passes half as much again."""
    model, losses = model_for(tiny_model, "llama", "lora"), []

    def objective(tensors: dict[str, torch.Tensor]) -> LossSum:
        result = sft.loss(tensors)
        losses.append(weakref.ref(result.loss_sum))
        return result

    def forward(model: torch.nn.Module, pack: Pack) -> dict[str, torch.Tensor]:
        assert all(loss() is None for loss in losses)
        return step.forward(model, pack)

    backward(model, rows_of(EIGHT), objective, 45, forward=forward)
    assert len(losses) == 4


# ---- masked tokens ---------------------------------------------------------------------------------------------------


def with_silent_end(seed: int, num_silent: int = 4, leak: float = 0.0) -> list[Row]:
    """Rows whose last tokens carry no loss; `seed` draws those tokens, from the upper half of the vocabulary."""
    generator = np.random.default_rng(seed)
    rows = []
    for row in rows_of((21, 9, 30)):
        ids, weights = row.input_ids % (VOCAB_SIZE // 2), row.weights.copy()
        ids[-num_silent:] = generator.integers(VOCAB_SIZE // 2, VOCAB_SIZE, size=num_silent)
        weights[-num_silent:] = leak
        weights[-num_silent - 1] = 1.0
        rows.append(Row(ids, weights))
    return rows


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mistral", "gpt2"])
def test_tokens_without_loss_at_the_end_of_a_row_do_nothing(tiny_model: Callable, family: str):
    """They are targets of nothing and nobody may look ahead at them. With the smallest weight they do a lot."""
    model = model_for(tiny_model, family, "full")
    figures = [(backward(model, with_silent_end(seed), sft.loss, 60)["loss"], trained_gradients(model)) for seed in (1, 2)]
    (loss, found), (other_loss, other) = figures
    assert loss == pytest.approx(other_loss, abs=allowed("packed_logprobs"))
    assert relative_difference(found, other) < allowed("gradients")
    leaking = []
    for seed in (1, 2):
        backward(model, with_silent_end(seed, leak=0.01), sft.loss, 60)
        leaking.append(trained_gradients(model))
    assert relative_difference(*leaking) > PLANTED_FACTOR * allowed("gradients")


def test_their_embeddings_get_a_gradient_of_exactly_zero(tiny_model: Callable):
    """Llama's twin has a head of its own, so that its embeddings hear of a token from its inputs alone."""
    model = model_for(tiny_model, "llama", "full")
    rows = with_silent_end(1)
    backward(model, rows, sft.loss, 60)
    gradient = gradients(model)["model.embed_tokens.weight"]
    silent = np.unique(np.concatenate([row.input_ids[-4:] for row in rows]))
    heard = np.unique(np.concatenate([row.input_ids[:-5] for row in rows]))
    assert gradient[torch.from_numpy(silent)].abs().max() == 0
    assert gradient[torch.from_numpy(heard)].abs().amax(1).min() > 0


def test_a_mask_that_reaches_one_token_too_far_is_seen(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    """The planted error of the two tests above: the first silent token becomes a target."""
    model, true_pack = model_for(tiny_model, "llama", "full"), step.pack

    def shifted(rows: Sequence[Row]) -> Pack:
        return true_pack([Row(row.input_ids, np.roll(row.weights, 1)) for row in rows])

    monkeypatch.setattr(step, "pack", shifted)
    found = []
    for seed in (1, 2):
        backward(model, with_silent_end(seed), sft.loss, 60)
        found.append(trained_gradients(model))
    assert relative_difference(*found) > PLANTED_FACTOR * allowed("gradients")
