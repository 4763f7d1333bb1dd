"""Passes side by side: the numbers do not depend on which thread is faster, and nothing that fails is lost or left running."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from parity.tolerances import allowed
from test_loop import CONFIG, DROPOUT_LORA, NUM_STEPS, Run, assert_same_bytes, rows

from giong.config import MethodConfig
from giong.contracts import LossSum
from giong.engine import lanes, memory, step
from giong.engine.compiled import compiled_kernels
from giong.engine.distributed import ALONE
from giong.engine.elementwise import use_kernels
from giong.engine.embedding_noise import EmbeddingNoise
from giong.engine.lanes import may_share, num_lanes, side_by_side
from giong.engine.memory import ActivationPlan, activation_memory
from giong.engine.step import backward
from giong.errors import Interrupted
from giong.methods import METHODS
from giong.objectives import sft
from giong.sizing import lanes as rule

BUDGET = 70
"""Of the rows of `test_loop`, a pair of passes side by side and more than one pair."""


@pytest.fixture
def two_lanes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models as small as the twins are computed in two lanes, on any machine."""
    monkeypatch.setattr(rule, "MIN_NUMBERS", 0)
    monkeypatch.setattr(rule, "MOVING_SHARE", 1.0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def lora_model(tiny_model: Callable, family: str = "llama", method: MethodConfig = DROPOUT_LORA, **changes: object) -> torch.nn.Module:
    model = METHODS["lora"].apply(tiny_model(family, **changes).model, method, seed=1).model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    return model.train()


def gradients(model: torch.nn.Module, slow: tuple[int, ...] = ()) -> list[torch.Tensor]:
    """Of one step with dropout; the passes of these numbers take their time at the start."""
    count, lock = iter(range(1000)), threading.Lock()

    def objective(tensors: dict[str, torch.Tensor]) -> LossSum:
        with lock:
            number = next(count)
        if number in slow:
            time.sleep(0.05)
        return sft.loss(tensors)

    torch.manual_seed(5)
    backward(model, rows(), objective, BUDGET)
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()
    return found


def counted_lanes(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the threads that passes are computed in, from here on."""
    names: set[str] = set()
    plain = step.forward_logprobs

    def noted(*given: object) -> dict[str, torch.Tensor]:
        names.add(threading.current_thread().name)
        return plain(*given)

    monkeypatch.setattr(step, "forward_logprobs", noted)
    return names


@pytest.mark.parametrize("slow", [(0,), (1,), (0, 3)])
def test_which_thread_is_faster_changes_no_bit(
    tiny_model: Callable, two_lanes: None, monkeypatch: pytest.MonkeyPatch, slow: tuple[int, ...]
):
    model, names = lora_model(tiny_model), counted_lanes(monkeypatch)
    expected = gradients(model)
    assert len(names) == 2 and "MainThread" not in names
    assert all(torch.equal(left, right) for left, right in zip(expected, gradients(model, slow)))


def test_dropout_from_one_generator_would_be_seen(tiny_model: Callable, two_lanes: None, monkeypatch: pytest.MonkeyPatch):
    """The planted error of the test above."""
    monkeypatch.setattr(lanes, "seeded", lambda seed: nullcontext())
    model, start = lora_model(tiny_model), step.forward_logprobs

    def in_turn(first: str, *given: object) -> dict[str, torch.Tensor]:
        if not threading.current_thread().name.endswith(first):
            time.sleep(0.05)
        return start(*given)

    found = []
    for first in ("0", "1"):
        monkeypatch.setattr(step, "forward_logprobs", partial(in_turn, first))
        found.append(gradients(model))
    assert not all(torch.equal(left, right) for left, right in zip(*found))


@pytest.mark.parametrize("stop_at", [1, 5])
def test_stopped_and_resumed_gives_the_same_bytes(
    tiny_model: Callable, tmp_path: Path, two_lanes: None, monkeypatch: pytest.MonkeyPatch, stop_at: int
):  # fmt: skip
    names, config = counted_lanes(monkeypatch), replace(CONFIG, max_tokens_per_pack=BUDGET)
    whole, stopped = (Run(tiny_model, tmp_path / name, config=config) for name in ("whole", "stopped"))
    whole.go()
    with pytest.raises(Interrupted):
        stopped.go(stop_at=stop_at)
    stopped.go()
    assert any(name.startswith("lane") for name in names)
    assert_same_bytes(whole.weights(), stopped.weights())
    assert whole.losses() == stopped.losses() and len(whole.losses()) == NUM_STEPS


def test_a_pass_without_memory_makes_packs_smaller(tiny_model: Callable, tmp_path: Path, two_lanes: None):
    run, failed = Run(tiny_model, tmp_path, config=replace(CONFIG, max_tokens_per_pack=BUDGET)), []

    def objective(tensors: dict[str, torch.Tensor]) -> LossSum:
        if not failed and threading.current_thread().name.startswith("lane"):
            failed.append(threading.current_thread().name)
            raise torch.OutOfMemoryError("no room")
        return sft.loss(tensors)

    result = run.go(objective=objective)
    assert failed and result.num_steps == NUM_STEPS and result.max_tokens_per_pack < BUDGET
    assert any("memory ran out" in event.message for event in run.events)


def test_the_first_failure_in_the_order_of_the_passes_is_raised_once_nothing_is_computed():
    running, seen = set(), []

    def compute(number: int) -> int:
        running.add(number)
        time.sleep(0.02 * max(3 - number, 1))
        seen.append(number)
        running.discard(number)
        if number in (0, 1):
            raise ValueError(f"pass {number}")
        return number

    with pytest.raises(ValueError, match="pass 0"), closing(side_by_side(range(8), compute, 2)) as made:
        list(made)
    assert not running and 7 not in seen


def test_results_come_in_order_and_threads_have_their_share_of_the_cores(two_lanes: None):
    def compute(number: int) -> tuple[int, int]:
        time.sleep(0.01 * (number % 3))
        return number, torch.get_num_threads()

    assert list(side_by_side(range(9), compute, 2)) == [(number, 1) for number in range(9)]
    assert torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2, "a later thread has all cores again"


LENGTHS = [len(row) for row in rows()]


def test_few_long_or_small_passes_have_one_lane(tiny_model: Callable, two_lanes: None, monkeypatch: pytest.MonkeyPatch):
    model = lora_model(tiny_model)
    assert num_lanes(model, LENGTHS, BUDGET) == 2
    assert num_lanes(model, LENGTHS, 2 * max(LENGTHS) - 1) == 1, "two passes with the longest row do not fit into the budget"
    assert num_lanes(model, LENGTHS[:1], BUDGET) == 1
    assert num_lanes(model, LENGTHS, BUDGET, replace_size(2)) == 1
    monkeypatch.setattr(rule, "MIN_NUMBERS", model.config.hidden_size * (BUDGET // 2) + 1)
    assert num_lanes(model, LENGTHS, BUDGET) == 1
    torch.set_num_threads(1)
    monkeypatch.setattr(rule, "MIN_NUMBERS", 0)
    assert num_lanes(model, LENGTHS, BUDGET) == 1


def replace_size(size: int) -> object:
    """Processes of which only the number is asked."""
    made = type(ALONE).__new__(type(ALONE))
    made.__dict__.update({**ALONE.__dict__, "size": size})
    return made


def test_compiled_loops_have_one_lane(tiny_model: Callable, two_lanes: None):
    model = lora_model(tiny_model)
    assert may_share(model)
    with use_kernels(compiled_kernels()):
        assert not may_share(model)


@pytest.mark.parametrize("num_layers", [1, 4])
def test_layers_computed_again_change_no_bit(tiny_model: Callable, two_lanes: None, monkeypatch: pytest.MonkeyPatch, num_layers: int):
    """How many they are depends on the memory that was free when a run was resumed."""
    model, names = lora_model(tiny_model), counted_lanes(monkeypatch)
    expected = gradients(model)
    with activation_memory(model, ActivationPlan(num_layers, False, 0, "")):
        found = gradients(model, slow=(1,))
        # The planted error: the second time they draw other seeds.
        monkeypatch.setattr(memory.lora_dropout, "drawn_again", lambda: (nullcontext(), nullcontext()))
        planted = gradients(model)
    assert len(names) == 2 and "MainThread" not in names
    assert all(torch.equal(left, right) for left, right in zip(expected, found))
    assert not all(torch.equal(left, right) for left, right in zip(expected, planted))


def test_other_dropout_than_that_of_a_plain_lora_has_one_lane(tiny_model: Callable, two_lanes: None):
    assert may_share(lora_model(tiny_model))
    assert not may_share(lora_model(tiny_model, "llama", attention_dropout=0.1))
    assert may_share(lora_model(tiny_model, "llama", attention_dropout=0.1).eval())
    assert not may_share(lora_model(tiny_model, "gpt2", resid_pdrop=0.1))
    # DoRA's dropout is PEFT's own.
    assert not may_share(lora_model(tiny_model, "llama", DROPOUT_LORA.model_copy(update={"use_dora": True})))


def test_a_router_with_jitter_has_one_lane(tiny_model: Callable, two_lanes: None):
    """PhiMoE draws from torch's one generator where it chooses an expert in training."""
    experts = MethodConfig(name="lora", lora_r=2, lora_alpha=2.0, lora_dropout=0.0, target_modules=["q_proj"])
    assert not may_share(lora_model(tiny_model, "phimoe", experts))
    assert may_share(lora_model(tiny_model, "phimoe", experts).eval())
    assert may_share(lora_model(tiny_model, "phimoe", experts, router_jitter_noise=0.0))


def test_what_a_pass_draws_from_the_one_generator_moves_no_seed(two_lanes: None, monkeypatch: pytest.MonkeyPatch):
    seeds: list[list[int]] = []
    monkeypatch.setattr(lanes, "_with_seed", lambda seed, compute, given: (seeds[-1].append(seed), compute(given)))
    for draws in (0, 3):
        torch.manual_seed(7)
        seeds.append([])
        list(side_by_side(range(6), lambda number, draws=draws: torch.rand(draws), 2))
    assert sorted(seeds[0]) == sorted(seeds[1]) and len(set(seeds[0])) == 6


@pytest.mark.parametrize(("error", "waits"), [(KeyboardInterrupt, False), (ValueError, True)])
def test_who_stops_at_once_does_not_wait_for_a_pass(error: type[BaseException], waits: bool):
    under_way, going_on, ended = threading.Event(), threading.Event(), []

    def compute(number: int) -> int:
        if number == 0:
            under_way.wait(10)
            raise error
        under_way.set()
        going_on.wait(10)
        ended.append(number)
        return number

    if waits:
        threading.Timer(0.2, going_on.set).start()
    with pytest.raises(error), closing(side_by_side(range(2), compute, 2)) as made:
        list(made)
    assert ended == ([1] if waits else [])
    going_on.set()


def test_most_of_the_weights_have_one_lane(tiny_model: Callable, two_lanes: None, monkeypatch: pytest.MonkeyPatch):
    model = tiny_model("llama").model.requires_grad_(True)
    assert num_lanes(model, LENGTHS, BUDGET) == 2
    monkeypatch.setattr(rule, "MOVING_SHARE", 0.1)
    assert num_lanes(model, LENGTHS, BUDGET) == 1
    assert num_lanes(model.requires_grad_(False), LENGTHS, BUDGET) == 1, "nothing moves"


@pytest.mark.parametrize("is_shared", [False, True], ids=["each thread's", "planted: one for all"])
def test_noise_on_embeddings_is_that_of_each_pass(
    tiny_model: Callable, two_lanes: None, monkeypatch: pytest.MonkeyPatch, is_shared: bool
):  # fmt: skip
    """Both threads have noted the lengths of their first passes before either uses them."""
    model = lora_model(tiny_model, method=DROPOUT_LORA.model_copy(update={"lora_dropout": 0.0}))
    noise, both, turns = EmbeddingNoise(5.0), threading.Barrier(2, timeout=60), iter(range(2))
    with noise.on(model):
        alone = gradients_alone(model)
    if is_shared:
        noise._of_thread = SimpleNamespace()
    note = noise._note_lengths

    def note_and_wait(*given: object) -> None:
        note(*given)
        if next(turns, None) is not None:
            both.wait()

    monkeypatch.setattr(noise, "_note_lengths", note_and_wait)
    with noise.on(model):
        if is_shared:
            with pytest.raises(RuntimeError, match="split_sizes"):
                gradients(model)
        else:
            found = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(gradients(model), alone))
            assert found < allowed("gradients")


def test_rows_that_are_compared_share_one_pass(tiny_model: Callable, tmp_path: Path, two_lanes: None, monkeypatch: pytest.MonkeyPatch):
    names, run = counted_lanes(monkeypatch), Run(tiny_model, tmp_path, config=replace(CONFIG, max_tokens_per_pack=BUDGET))
    run.options["couples_rows"] = True
    seen = []

    def objective(tensors: dict[str, torch.Tensor]) -> LossSum:
        seen.append(int(tensors["row_of_N"].max()) + 1)
        return sft.loss(tensors)

    run.go(objective=objective)
    # Eight rows in steps of three: no step was parted.
    assert seen == [3, 3, 2] * 4
    assert not any(name.startswith("lane") for name in names)


def gradients_alone(model: torch.nn.Module) -> list[torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rule, "MAX_LANES", 1)
        return gradients(model)


def test_a_forward_that_changes_the_model_has_one_lane(
    tiny_model: Callable, tmp_path: Path, two_lanes: None, monkeypatch: pytest.MonkeyPatch
):
    """Where the base is computed, the start of what moves is put into the model for all threads."""
    names = counted_lanes(monkeypatch)
    run = Run(tiny_model, tmp_path, config=replace(CONFIG, max_tokens_per_pack=BUDGET, kl_weight=0.1))
    run.go()
    assert not any(name.startswith("lane") for name in names)
