"""Activations computed again or sent away: the same gradients to the last byte, less memory, and a plan that arithmetic can follow."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_packing import EIGHT, gradients, rows_of
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import giong.engine.fast_path as fast_path_module
import giong.engine.step as step
from giong.config import MethodConfig, ObjectiveConfig, TrainConfig
from giong.engine.fast_path import fast_path
from giong.engine.memory import (
    ActivationPlan,
    KeptBytes,
    Offload,
    activation_memory,
    choose_plan,
    decoder_layers,
    head_gradient_bytes,
    largest_pack,
    measure_kept_bytes,
    offloaded,
    plan_activations,
)
from giong.engine.packing import pack
from giong.engine.step import backward, forward_logprobs
from giong.errors import ConfigError
from giong.methods import METHODS
from giong.models.rows import Row
from giong.objectives import sft
from giong.sizing.defaults import ResolvedTraining
from giong.workflow.training import computing

FAMILIES = ("llama", "qwen3", "gemma2", "gpt2", "neox", "mistral")
METHODS_HERE = {
    "full": MethodConfig(name="full"),
    "lora with dropout": MethodConfig(name="lora", lora_r=4, lora_alpha=8.0, lora_dropout=0.3),
}
PARTS = {
    "last layers": MethodConfig(name="last_layers", num_layers=2), "first layer": MethodConfig(name="last_layers", num_layers=1, layers_from="first"),
    "norm": MethodConfig(name="norm"),
}  # fmt: skip
NUM_LAYERS = 4


def plan(num_layers: int, offload: bool = False) -> ActivationPlan:
    return ActivationPlan(num_layers, offload, 0, "")


def tuned(tiny_model: Callable, family: str, method: str, **changes: object) -> torch.nn.Module:
    """A model in training mode, its adapters off zero, so that every parameter gets a gradient."""
    name = "n_layer" if family == "gpt2" else "num_hidden_layers"
    loaded = tiny_model(family, **{name: NUM_LAYERS}, **changes)
    config = (METHODS_HERE | PARTS)[method]
    trainable = METHODS[config.name].apply(loaded.model, config, seed=3)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter_name, parameter in trainable.parameters.items():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.2)
    return trainable.model.train()


def trained_gradients(model: torch.nn.Module, rows: list[Row], max_tokens: int = 60) -> dict[str, torch.Tensor]:
    """Several packs, so that the random state runs on from one pass to the next."""
    torch.manual_seed(17)
    backward(model, rows, sft.loss, max_tokens)
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    return found


def differing(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    assert set(left) == set(right)
    return [name for name in left if not torch.equal(left[name], right[name])]


# ---- no number changes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS_HERE | PARTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_bytes_whatever_is_computed_again(tiny_model: Callable, family: str, method: str):
    model, rows = tuned(tiny_model, family, method), rows_of(EIGHT)
    expected = trained_gradients(model, rows)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    for number in (1, NUM_LAYERS):
        with activation_memory(model, plan(number)):
            assert differing(trained_gradients(model, rows), expected) == []
    assert differing(trained_gradients(model, rows), expected) == []


def test_a_layer_computed_again_outside_the_fast_path_is_seen(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    """The planted error: the engine's layers stand in for the forward pass alone. Rows would see each other, or torch objects."""
    model, rows = tuned(tiny_model, "llama", "full"), rows_of(EIGHT)
    expected = trained_gradients(model, rows)
    entered = []

    def only_inside(given: torch.nn.Module):  # type: ignore[no-untyped-def]
        entered.append(given)
        # The first entry is the one around forward and backward; here it does nothing.
        return fast_path(given) if len(entered) > 1 else torch.enable_grad()

    monkeypatch.setattr(step, "fast_path", only_inside)
    with activation_memory(model, plan(NUM_LAYERS)):
        try:
            found = trained_gradients(model, rows, max_tokens=1000)
        except (torch.utils.checkpoint.CheckpointError, TypeError):
            return
    assert differing(found, expected)


def test_dropout_drawn_anew_is_seen(tiny_model: Callable):
    model, rows = tuned(tiny_model, "llama", "lora with dropout"), rows_of(EIGHT)
    expected = trained_gradients(model, rows)
    with activation_memory(model, plan(NUM_LAYERS)):
        for layer in decoder_layers(model):
            keeping = layer._gradient_checkpointing_func
            layer._gradient_checkpointing_func = lambda *given, keeping=keeping: keeping(*given, preserve_rng_state=False)
        assert differing(trained_gradients(model, rows), expected)


def test_the_engines_layers_compute_again(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    """One gated MLP per layer, and once more for each layer that is computed again."""
    model, calls = tuned(tiny_model, "llama", "full"), []
    true_mlp = fast_path_module.gated_down
    monkeypatch.setattr(fast_path_module, "gated_down", lambda *args: calls.append(1) or true_mlp(*args))
    # The first pass tries the layers out.
    backward(model, rows_of((9,)), sft.loss, 9)
    for number in (0, 3):
        calls.clear()
        with activation_memory(model, plan(number)):
            backward(model, rows_of((9,)), sft.loss, 9)
        assert len(calls) == NUM_LAYERS + number


def test_the_model_is_left_as_it_was(tiny_model: Callable):
    model = tuned(tiny_model, "llama", "full")
    before = [dict(layer.__dict__) for layer in decoder_layers(model)]
    with pytest.raises(RuntimeError, match="on purpose"), activation_memory(model, plan(2)):
        assert [layer.gradient_checkpointing for layer in decoder_layers(model)] == [True, True, False, False]
        raise RuntimeError("on purpose")
    assert [layer.__dict__.keys() for layer in decoder_layers(model)] == [kept.keys() for kept in before]
    assert not any(layer.gradient_checkpointing for layer in decoder_layers(model))


# ---- memory ----------------------------------------------------------------------------------------------------------


class Born(TorchDispatchMode):
    """Notes every storage that comes into the world, and knows later which of them still live. Weights are not new."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.own:
                    self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def living_bytes(self) -> int:
        gc.collect()
        return sum(num_bytes for reference, num_bytes in self.storages.values() if not reference.expired())


def living_after_forward(model: torch.nn.Module, rows: list[Row]) -> int:
    """Bytes that a pass's graph holds when the backward pass would begin."""
    given = pack(rows)
    with fast_path(model):
        with Born(model) as born:
            loss = sft.loss(forward_logprobs(model, given)).loss_sum
        living = born.living_bytes()
    assert loss.requires_grad
    return living


@pytest.mark.parametrize("method", METHODS_HERE)
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_falls_as_measured(tiny_model: Callable, family: str, method: str):
    """What lives after the forward pass, with 0 to 4 layers computed again, against what the measurement says of it."""
    model, rows = tuned(tiny_model, family, method), rows_of((40, 33, 50, 21))
    measured = measure_kept_bytes(model, rows)
    assert len(measured.layers) == NUM_LAYERS
    assert measured.entry == 144 * 64 * 4
    for number in (0, 1, 3, NUM_LAYERS):
        with activation_memory(model, plan(number)):
            living = living_after_forward(model, rows)
        # Beside what autograd keeps, the pass holds masks, positions and the rotary angles.
        assert living == pytest.approx(measured.with_checkpointing(number), rel=0.05, abs=8 * 144 * 64)
    assert measured.with_checkpointing(NUM_LAYERS) < 0.4 * measured.with_checkpointing(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_below_those_that_move_cost_nothing_either_way(tiny_model: Callable, family: str):
    """Two of four move: the first two keep nothing, whether they are asked to be computed again or not, and are not counted."""
    model, rows = tuned(tiny_model, family, "last layers"), rows_of((40, 33, 50, 21))
    measured = measure_kept_bytes(model, rows)
    assert measured.layers[:2] == (0, 0)
    assert measured.with_checkpointing(0) == measured.with_checkpointing(2) > measured.with_checkpointing(3)
    for number in (0, 2, 3, NUM_LAYERS):
        with activation_memory(model, plan(number)):
            living = living_after_forward(model, rows)
        assert living == pytest.approx(measured.with_checkpointing(number), rel=0.05, abs=8 * 144 * 64)
    room = measured.with_checkpointing(3) + 2 * max(measured.layers)
    found = choose_plan(measured, room_bytes=room, checkpointing="auto", offload=False, can_offload=False)
    assert found.num_checkpointed == 3
    assert "1 of 4 layers are computed again" in found.reason


def test_measuring_leaves_nothing_behind(tiny_model: Callable):
    model, rows = tuned(tiny_model, "llama", "lora with dropout").eval(), rows_of((40, 33))
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    measured = measure_kept_bytes(model, rows)
    assert torch.equal(torch.rand(4), expected)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in decoder_layers(model))
    # Dropout's masks count, although the model was in evaluation mode.
    plain = tuned(tiny_model, "llama", "full")
    assert measure_kept_bytes(plain, rows).layers[1] != measured.layers[1]


def test_the_largest_pack_holds_the_longest_rows():
    silent = Row(rows_of((99,))[0].input_ids, rows_of((99,))[0].weights * 0)
    rows = [*rows_of((5, 33, 17, 2, 26, 9, 40, 12)), silent]
    assert sorted(len(row) for row in largest_pack(rows, 75)) == [2, 33, 40]
    assert [len(row) for row in largest_pack(rows, 10)] == [40]
    # Rows that are compared with each other: as many groups as a step has, whatever a pack may hold.
    assert [len(row) for row in largest_pack(rows, None, 3)] == [40, 33, 26]
    pairs = [dataclasses.replace(row, group=index // 2) for index, row in enumerate(rows)]
    assert [len(row) for row in largest_pack(pairs, None, 2)] == [40, 12, 5, 33]
    # A step has so many, also where a pack could hold more.
    assert [len(row) for row in largest_pack(rows, 75, 1)] == [40]
    assert largest_pack([], 75) == []


def test_the_largest_pack_counts_the_virtual_tokens_before_each_of_its_rows():
    """Of packs of 75 tokens one with the longest row has 67 and four rows, one of short rows 72 and eight."""
    rows = rows_of((40, 38, *[9] * 8))
    assert [len(row) for row in largest_pack(rows, 75)] == [40, 9, 9, 9]
    assert [len(row) for row in largest_pack(rows, 75, num_virtual_tokens=5)] == [9] * 8
    assert [len(row) for row in largest_pack(rows, 75, 4, num_virtual_tokens=5)] == [40, 9, 9, 9]
    # Of many lengths some are tried.
    assert len(largest_pack(rows_of((70, *range(60, 10, -1), *[9] * 100)), 75, num_virtual_tokens=5)) == 8


# ---- the plan --------------------------------------------------------------------------------------------------------

KEPT = KeptBytes(layers=(100, 100, 100, 100), entry=10, rest=50)
"""450 bytes with everything kept, 90 less for each layer; the backward pass works in 200 more."""


@pytest.mark.parametrize(
    ("room_bytes", "number", "offload"),
    [(650, 0, False), (649, 1, False), (560, 1, False), (559, 2, False), (290, 4, False), (289, 4, True), (-5, 4, True), (None, 0, False)],
)
def test_as_few_layers_as_fit_by_hand(room_bytes: int | None, number: int, offload: bool):
    made = choose_plan(KEPT, room_bytes=room_bytes, checkpointing="auto", offload="auto", can_offload=True)
    assert (made.num_checkpointed, made.offload) == (number, offload)
    assert made.kept_bytes == 450 - 90 * number
    assert f"{number} of 4 layers" in made.reason


@pytest.mark.parametrize(("setting", "number"), [("none", 0), ("all", 4), (0, 0), (3, 3)])
def test_what_the_user_sets_is_done(setting: str | int, number: int):
    assert choose_plan(KEPT, room_bytes=1, checkpointing=setting, offload=False, can_offload=True).num_checkpointed == number
    assert choose_plan(KEPT, room_bytes=10**9, checkpointing=setting, offload="auto", can_offload=True).num_checkpointed == number


def test_a_cpu_sends_nothing_away_and_says_so():
    asked = choose_plan(KEPT, room_bytes=10**9, checkpointing="auto", offload=True, can_offload=False)
    assert not asked.offload
    assert "a CPU has no other memory" in asked.reason
    assert asked.fits
    assert "may not fit" not in asked.reason
    in_vain = choose_plan(KEPT, room_bytes=1, checkpointing="none", offload=True, can_offload=False)
    assert "a CPU has no other memory" in in_vain.reason
    assert "may not fit" in in_vain.reason
    assert not in_vain.fits
    forced = choose_plan(KEPT, room_bytes=1, checkpointing="auto", offload="auto", can_offload=False)
    assert not forced.offload
    assert "may not fit" in forced.reason


def test_the_plan_of_a_model_follows_what_is_free(tiny_model: Callable):
    model, rows = tuned(tiny_model, "llama", "full"), rows_of((40, 33, 50, 21))
    settings = {"num_trainable": 1000}
    measured = measure_kept_bytes(model, rows)
    assert plan_activations(model, rows, budget_bytes=None, **settings).num_checkpointed == 0
    assert plan_activations(model, rows, budget_bytes=10**10, **settings).num_checkpointed == 0
    assert plan_activations(model, rows, budget_bytes=10**4, **settings).num_checkpointed == NUM_LAYERS
    # Room for all layers but two: a tenth stays free, 16 bytes per parameter and a chunk of 448 logits come before.
    needed = measured.with_checkpointing(2) + 2 * max(measured.layers) + 12_000 + 256 * 448 * 8
    assert plan_activations(model, rows, budget_bytes=round(needed / 0.9) + 2, **settings).num_checkpointed == 2
    assert plan_activations(model, rows, budget_bytes=round(needed / 0.9) - 2, **settings).num_checkpointed == 3
    # And a copy of what moves, made before the first step.
    for change, number in ((2, 2), (-2, 3)):
        budget = round((needed + 4000) / 0.9) + change
        assert plan_activations(model, rows, budget_bytes=budget, anchor_bytes=4000, **settings).num_checkpointed == number


def test_a_trained_heads_gradient_is_counted_once(tiny_model: Callable):
    """In fp32 a pass of rows that stand alone keeps the sum itself; of a pair the head runs again, and the sum is formed behind the peak."""
    model, rows = tuned(tiny_model, "llama", "full", tie_word_embeddings=False), rows_of((40, 33))
    pair = [dataclasses.replace(row, group=0) for row in rows]
    weight = model.get_output_embeddings().weight
    assert head_gradient_bytes(model, rows) == 0
    assert head_gradient_bytes(model, pair) == weight.numel() * 4
    with_head = measure_kept_bytes(model, rows).rest
    weight.requires_grad_(False)
    assert head_gradient_bytes(model, pair) == 0
    # A frozen head keeps the gradient of the states alone; a trained one also its inputs.
    inputs = with_head - measure_kept_bytes(model, rows).rest - weight.numel() * 4
    assert 0 <= inputs <= 2 * 4 * 73 * (64 + 2)
    model.to(torch.bfloat16).requires_grad_(True)
    assert head_gradient_bytes(model, rows) == weight.numel() * 2
    assert head_gradient_bytes(model, pair) == weight.numel() * 6
    assert head_gradient_bytes(model, []) == 0


def test_the_plan_leaves_room_for_a_trained_heads_gradient(tiny_model: Callable):
    model, rows = tuned(tiny_model, "llama", "full"), [dataclasses.replace(row, group=0) for row in rows_of((40, 33))]
    measured, head_bytes = measure_kept_bytes(model, rows), model.get_output_embeddings().weight.numel() * 4
    needed = measured.with_checkpointing(2) + 2 * max(measured.layers) + 12_000 + 256 * 448 * 8 + head_bytes
    for change, number in ((2, 2), (-2, 3)):
        made = plan_activations(model, rows, budget_bytes=round(needed / 0.9) + change, num_trainable=1000)
        assert made.num_checkpointed == number


@dataclasses.dataclass
class AStory:
    """What `computing` asks a story for; `said` is what the user reads."""

    config: SimpleNamespace
    processes: None = None
    said: list[str] = dataclasses.field(default_factory=list)
    local = SimpleNamespace(loaded=SimpleNamespace(max_seq_length=64))

    def examples_of(self, side: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(id="asked")]

    def notice(self, stage: str, text: str) -> None:
        self.said.append(text)


def computed(
    model: torch.nn.Module, rows: list[Row], *, couples_rows: bool = False, objective: str = "sft", **settings: object
) -> tuple[ActivationPlan, list[str]]:
    """The plan of a run in packs of at most 50 tokens and steps of three rows, and what is said about it."""
    train = TrainConfig(**settings).model_copy(update={"max_tokens_per_pack": 50, "batch_rows": 3})
    story = AStory(SimpleNamespace(train=train, objective=ObjectiveConfig(name=objective, max_new_tokens=20, num_generations=2)))
    trainable = SimpleNamespace(model=model, num_trainable=1000, parameters={"what moves": torch.zeros(1000)})
    resolved = ResolvedTraining(MethodConfig(name="full"), train, {})
    with computing(story, trainable, rows, resolved, "train", compiled=False, couples_rows=couples_rows) as made:
        return made, story.said


def test_rows_that_are_compared_are_planned_as_the_one_pack_that_they_are(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    model, rows = tuned(tiny_model, "llama", "full"), rows_of((40, 33, 50, 21))
    measured = {"pack": measure_kept_bytes(model, [rows[2]]), "step": measure_kept_bytes(model, [rows[2], rows[0], rows[1]])}
    # Room for a pack with everything kept, which is not enough for a step.
    needed = measured["pack"].with_checkpointing(0) + 2 * max(measured["pack"].layers) + 12_000 + 256 * 448 * 8
    monkeypatch.setattr("giong.workflow.training.free_memory_bytes", lambda device: round(needed / 0.9) + 2)
    apart, nothing = computed(model, rows)
    assert (apart.num_checkpointed, apart.kept_bytes, nothing) == (0, measured["pack"].with_checkpointing(0), [])
    together, said = computed(model, rows, couples_rows=True)
    assert together.num_checkpointed > 0
    assert together.kept_bytes == measured["step"].with_checkpointing(together.num_checkpointed)
    assert said == [together.reason]


def row_with_answer(num_prompt_tokens: int, num_answer_tokens: int, **others: Any) -> Row:
    weights = np.repeat([0.0, 1.0], [num_prompt_tokens, num_answer_tokens]).astype(np.float32)
    return Row(np.ones(len(weights), dtype=np.int64), weights, "asked", **others)


@pytest.mark.parametrize(
    ("objective", "settings", "num_copies"),
    [("sft", {}, 0), ("sft", {"kl_weight": 0.1}, 1), ("sft", {"l2_to_base": 1.0}, 1), ("grpo", {}, 1), ("grpo", {"kl_weight": 0.1}, 2)],
)
def test_a_run_that_keeps_its_start_leaves_room_for_it(
    tiny_model: Callable, monkeypatch: pytest.MonkeyPatch, objective: str, settings: dict, num_copies: int
):
    found: list[int] = []

    def watched(model: torch.nn.Module, largest: list[Row], *, anchor_bytes: int, **given: Any) -> ActivationPlan:
        found.append(anchor_bytes)
        return plan_activations(model, largest, anchor_bytes=anchor_bytes, **given)

    monkeypatch.setattr("giong.workflow.training.plan_activations", watched)
    computed(tuned(tiny_model, "llama", "full"), [row_with_answer(3, 4)], objective=objective, **settings)
    # A thousand numbers in fp32.
    assert found == [4000 * num_copies]


def test_what_is_drawn_is_planned_for_at_its_limit(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    """Answers of up to 20 tokens, two to each request: those to the longer request fill a pack of 50 tokens."""
    model, rows = tuned(tiny_model, "llama", "full"), [row_with_answer(3, 3), row_with_answer(4, 4)]
    monkeypatch.setattr("giong.workflow.training.free_memory_bytes", lambda device: None)
    made, _ = computed(model, rows, objective="grpo")
    longest = [row_with_answer(4, 20, extras={"advantages_R": 0.0})] * 2
    assert made.kept_bytes == measure_kept_bytes(model, longest).with_checkpointing(0)


def test_what_was_asked_for_and_cannot_be_done_is_said(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    model, rows = tuned(tiny_model, "llama", "full"), rows_of((40, 33))
    free_bytes = 10**10
    monkeypatch.setattr("giong.workflow.training.free_memory_bytes", lambda device: free_bytes)
    for offload in ("auto", False):
        assert computed(model, rows, activation_offload=offload)[1] == []
    _, said = computed(model, rows, activation_offload=True)
    assert len(said) == 1
    assert "a CPU has no other memory" in said[0]
    free_bytes = 10**4
    _, said = computed(model, rows, activation_checkpointing="none")
    assert len(said) == 1
    assert "may not fit" in said[0]


def test_a_measurement_that_does_not_fit_is_a_reason_to_keep_little(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    def refuse(*given: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model, settings = tuned(tiny_model, "llama", "full"), {"num_trainable": 1, "budget_bytes": 10**10}
    monkeypatch.setattr("giong.engine.memory.forward", refuse)
    made = plan_activations(model, rows_of((9,)), **settings)
    assert (made.num_checkpointed, made.offload, made.fits) == (NUM_LAYERS, False, False)
    assert "not even one pass fits" in made.reason
    assert model.training
    silent = Row(rows_of((9,))[0].input_ids, rows_of((9,))[0].weights * 0)
    assert plan_activations(model, largest_pack([silent], 9), **settings).num_checkpointed == 0


@pytest.mark.parametrize(("setting", "message"), [(5, "5 layers cannot be checkpointed: the model has 4")])
def test_more_layers_than_there_are(tiny_model: Callable, setting: int, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        plan_activations(
            tuned(tiny_model, "llama", "full"),
            rows_of((9,)),
            num_trainable=1,
            budget_bytes=None,
            checkpointing=setting,
        )
    assert caught.value.place == "train.activation_checkpointing"


# ---- offload ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 2, NUM_LAYERS])
@pytest.mark.parametrize("method", METHODS_HERE)
def test_what_was_sent_away_comes_back(tiny_model: Callable, method: str, number: int):
    """On the CPU the way there and back is a copy; what a GPU's streams add to it is tested below."""
    model, rows = tuned(tiny_model, "llama", method), rows_of(EIGHT)
    expected = trained_gradients(model, rows)
    with activation_memory(model, plan(number)), offloaded(model, min_bytes=64) as offload:
        assert differing(trained_gradients(model, rows), expected) == []
        assert differing(trained_gradients(model, rows), expected) == []
    assert offload.num_sent_bytes > 0


def test_weights_and_small_tensors_stay_and_a_tensor_is_sent_once(tiny_model: Callable):
    model, rows = tuned(tiny_model, "llama", "full"), rows_of((40, 33, 50, 21))
    measured = measure_kept_bytes(model, rows)
    with offloaded(model, min_bytes=1) as offload:
        forward_logprobs(model, pack(rows))
    assert offload.num_sent_bytes <= measured.with_checkpointing(0)
    with offloaded(model, min_bytes=10**6) as offload:
        forward_logprobs(model, pack(rows))
    assert offload.num_sent_bytes == 0


def test_the_next_ones_are_on_their_way_when_one_is_fetched():
    weight = torch.nn.Linear(2, 2)
    offload, given = Offload(weight, min_bytes=1), [torch.full((3,), float(value)) for value in range(8)]
    sent = [offload.send(tensor) for tensor in given]
    assert [place for place, _ in sent] == list(range(8))
    assert offload.send(given[3]) == sent[3]
    assert offload.send(weight.weight) is weight.weight
    assert torch.equal(offload.fetch(sent[7]), given[7])
    assert [parcel.back is not None for _, parcel in sent] == [False, False, False, True, True, True, True, True]
    assert all(torch.equal(offload.fetch(parcel), tensor) for parcel, tensor in zip(reversed(sent), reversed(given), strict=True))


class FakeStream:
    """Notes what it is asked for, in the order of asking: `log` is shared by all streams of a test."""

    def __init__(self, name: str, log: list[tuple]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append((self.name, "waits for", other.name))

    def wait_event(self, event: str) -> None:
        self.log.append((self.name, "waits for", event))

    def record_event(self) -> str:
        event = f"event {sum(entry[1] == 'marks' for entry in self.log)}"
        self.log.append((self.name, "marks", event))
        return event


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeStream, list[tuple]]:
    """The stream of the copies, and the log: which stream copies, waits, marks an event, or keeps a tensor (by its first number)."""
    log: list[tuple] = []
    current = [FakeStream("computing", log)]
    empty_like, copy, to = torch.empty_like, torch.Tensor.copy_, torch.Tensor.to

    @contextlib.contextmanager
    def stream(entered: FakeStream) -> Iterator[None]:
        current.append(entered)
        yield
        current.pop()

    def pinned(tensor: torch.Tensor, *, device: str, pin_memory: bool) -> torch.Tensor:
        assert (device, pin_memory) == ("cpu", True)
        return empty_like(tensor)

    def sent(host: torch.Tensor, tensor: torch.Tensor, non_blocking: bool) -> torch.Tensor:
        log.append((current[-1].name, "sends" if non_blocking else "sends and waits", int(tensor[0])))
        return copy(host, tensor)

    def fetched(host: torch.Tensor, device: torch.device, non_blocking: bool) -> torch.Tensor:
        log.append((current[-1].name, "fetches" if non_blocking else "fetches and waits", int(host[0])))
        return to(host, device, copy=True)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch, "empty_like", pinned)
    monkeypatch.setattr(torch.Tensor, "copy_", sent)
    monkeypatch.setattr(torch.Tensor, "to", fetched)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append((stream.name, "keeps", int(tensor[0]))))
    return FakeStream("copies", log), log


def test_on_a_gpu_copies_wait_for_what_they_copy_and_the_computation_for_its_copy_alone(streams: tuple[FakeStream, list[tuple]]):
    """What has to come before what, on fake streams. A copy begins when the computing stream has made its tensor, and that memory is
    not given away before; what is fetched is waited for by its own event, so that those fetched ahead hold nothing up."""
    weight = torch.nn.Linear(2, 2)
    offload = Offload(weight, min_bytes=1)
    offload.stream, log = streams
    given = [torch.full((3,), float(value)) for value in range(3)]
    parcels = [offload.send(tensor) for tensor in given]
    assert log == [
        entry
        for value in range(3)
        for entry in [("copies", "waits for", "computing"), ("copies", "keeps", value), ("copies", "sends", value)]
    ]  # fmt: skip
    log.clear()
    assert torch.equal(offload.fetch(parcels[2]), given[2])
    assert log == [
        ("copies", "fetches", 2), ("copies", "marks", "event 0"), ("copies", "fetches", 1), ("copies", "marks", "event 1"),
        ("copies", "fetches", 0), ("copies", "marks", "event 2"), ("computing", "waits for", "event 0"), ("computing", "keeps", 2),
    ]  # fmt: skip
    log.clear()
    assert [torch.equal(offload.fetch(parcels[value]), given[value]) for value in (1, 0)] == [True, True]
    assert log == [
        ("computing", "waits for", "event 1"), ("computing", "keeps", 1), ("computing", "waits for", "event 2"), ("computing", "keeps", 0),
    ]  # fmt: skip


def test_a_tensor_changed_in_place_is_another_one():
    weight, tensor = torch.nn.Linear(2, 2), torch.zeros(3)
    offload = Offload(weight, min_bytes=1)
    before = offload.send(tensor)
    tensor += 1
    after = offload.send(tensor)
    assert torch.equal(offload.fetch(before), torch.zeros(3))
    assert torch.equal(offload.fetch(after), torch.ones(3))


def test_gradients_of_the_helper_are_not_empty(tiny_model: Callable):
    """`gradients` of the packing tests and these agree, so the equalities above are about something."""
    model = tuned(tiny_model, "llama", "full")
    expected = trained_gradients(model, rows_of(EIGHT))
    torch.manual_seed(17)
    backward(model, rows_of(EIGHT), sft.loss, 60)
    assert differing(gradients(model), expected) == []
