"""The training loop: it learns, it stops and goes on to the same bytes, it never leaves a run without its last good state."""

from __future__ import annotations

import math
import shutil
import time
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from giong.config import MethodConfig
from giong.contracts import Event, LossSum
from giong.engine import step as passes
from giong.engine.checkpoint import list_checkpoints, load_checkpoint
from giong.engine.loop import train
from giong.engine.loop_config import LoopConfig, TrainResult
from giong.engine.rollout import Rollout
from giong.errors import DataError, Interrupted, ResourceError, TrainingError
from giong.methods import METHODS, Trainable
from giong.models.rows import Row
from giong.objectives import sft
from giong.workspace import PARTIAL

CONFIG = LoopConfig(
    learning_rate=2e-2, num_epochs=4, batch_rows=3, max_tokens_per_pack=64, warmup_share=0.1, schedule="cosine",
    optimizer="adamw", weight_decay=0.01, max_grad_norm=1.0, seed=11, save_seconds=1e9, save_steps=None, keep_checkpoints=2,
)  # fmt: skip
NUM_STEPS = 12
DROPOUT_LORA = MethodConfig(name="lora", lora_r=4, lora_alpha=8.0, lora_dropout=0.2)
FULL = MethodConfig(name="full")


def rows() -> list[Row]:
    generator = np.random.default_rng(3)
    made = []
    for length in (9, 21, 14, 30, 12, 17, 25, 8):
        weights = np.ones(length, dtype=np.float32)
        weights[: length // 3] = 0.0
        made.append(Row(generator.integers(0, 300, size=length), weights))
    return made


class Run:
    """One run of the loop in a folder of its own; `go()` again is what a new process would do after a kill."""

    def __init__(self, tiny_model: Callable, folder: Path, method: MethodConfig = DROPOUT_LORA, config: LoopConfig = CONFIG) -> None:
        self.tiny_model, self.folder, self.method, self.config = tiny_model, folder, method, config
        self.events: list[Event] = []
        self.saved: list[int] = []
        self.trainable: Trainable | None = None
        self.rows = rows()
        self.prepare: Callable = lambda model: None
        self.options: dict[str, Any] = {}

    def go(
        self,
        *,
        stop_at: int | None = None,
        die_at: int | None = None,
        objective: Callable = sft.loss,
        should_stop: Callable[[], bool] | None = None,
    ) -> TrainResult:
        """`stop_at`: asked to stop before that step (from 0). `die_at`: killed after that step's event, without saving."""
        loaded = self.tiny_model("llama", dtype="float32" if self.method.name == "lora" else "bfloat16")
        self.prepare(loaded.model)
        self.trainable = METHODS[self.method.name].apply(loaded.model, self.method, seed=2)
        done = self.step_done

        def emit(event: Event) -> None:
            self.events.append(event)
            if event.kind == "step" and event.data["step"] == die_at:
                raise KilledError

        return train(
            self.trainable.model, self.trainable.parameters, self.rows, objective, self.config, checkpoints=self.folder, emit=emit,
            should_stop=should_stop or (lambda: stop_at is not None and done() >= stop_at), on_checkpoint=self.saved.append,
            **self.options,
        )  # fmt: skip

    def step_done(self) -> int:
        return max((event.data["step"] for event in self.events if event.kind in ("step", "notice")), default=0)

    def losses(self) -> dict[int, float]:
        return {event.data["step"]: event.data["loss"] for event in self.events if event.kind == "step"}

    def weights(self) -> dict[str, torch.Tensor]:
        assert self.trainable is not None
        return {name: tensor.clone() for name, tensor in self.trainable.model.state_dict().items()}


class KilledError(Exception):
    """Stands for a SIGKILL: nobody in giong catches it."""


def assert_same_bytes(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert set(left) == set(right)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("method", [DROPOUT_LORA, FULL], ids=["lora", "full in bf16"])
def test_the_loss_goes_down(tiny_model: Callable, tmp_path: Path, method: MethodConfig):
    run = Run(tiny_model, tmp_path, method, replace(CONFIG, num_epochs=8))
    result = run.go()
    losses = run.losses()
    assert result.num_steps == 24 == len(losses)
    assert result.final_loss == losses[24]
    assert np.mean([losses[step] for step in (22, 23, 24)]) < np.mean([losses[step] for step in (1, 2, 3)]) - 0.5
    assert result.num_tokens == 8 * sum(len(row) for row in rows())
    assert not run.trainable.model.training


def test_step_events_carry_the_figures(tiny_model: Callable, tmp_path: Path):
    run = Run(tiny_model, tmp_path)
    run.go()
    steps = [event for event in run.events if event.kind == "step"]
    assert [event.data["step"] for event in steps] == list(range(1, NUM_STEPS + 1))
    assert {"loss", "num_steps", "learning_rate", "grad_norm", "num_tokens", "tokens_per_second"} <= set(steps[0].data)
    assert all(event.stage == "train" and event.data["num_steps"] == NUM_STEPS for event in steps)
    assert run.saved == [NUM_STEPS]


def test_without_dropout_and_steps_nothing_random_is_left(tiny_model: Callable, tmp_path: Path):
    first, second = Run(tiny_model, tmp_path / "a"), Run(tiny_model, tmp_path / "b")
    first.go()
    torch.manual_seed(999)
    second.go()
    assert_same_bytes(first.weights(), second.weights())
    other = Run(tiny_model, tmp_path / "c", config=replace(CONFIG, seed=12))
    other.go()
    assert first.losses() != other.losses()


@pytest.mark.parametrize("method", [DROPOUT_LORA, FULL], ids=["lora", "full in bf16"])
@pytest.mark.parametrize("stop_at", [0, 1, 5, NUM_STEPS - 1])
def test_stopped_and_resumed_gives_the_same_bytes(tiny_model: Callable, tmp_path: Path, stop_at: int, method: MethodConfig):
    whole, stopped = Run(tiny_model, tmp_path / "whole", method), Run(tiny_model, tmp_path / "stopped", method)
    whole.go()
    with pytest.raises(Interrupted):
        stopped.go(stop_at=stop_at)
    assert stopped.step_done() == stop_at
    assert [path.name for path in list_checkpoints(tmp_path / "stopped")] == [f"step-{stop_at:08d}"]
    stopped.go()
    assert_same_bytes(whole.weights(), stopped.weights())
    assert whole.losses() == stopped.losses()


def test_killed_at_any_step_and_resumed_gives_the_same_bytes(tiny_model: Callable, tmp_path: Path):
    """Three kills between checkpoints: steps are repeated from the last checkpoint on, with the same dropout."""
    config = replace(CONFIG, save_steps=2)
    whole, killed = Run(tiny_model, tmp_path / "whole", config=config), Run(tiny_model, tmp_path / "killed", config=config)
    whole.go()
    for step in (1, 4, 7):
        with pytest.raises(KilledError):
            killed.go(die_at=step)
    killed.go()
    assert_same_bytes(whole.weights(), killed.weights())
    assert whole.losses() == killed.losses()


def test_a_forgotten_seed_would_be_seen(tiny_model: Callable, tmp_path: Path):
    """The planted error of the tests above: going on with other random numbers gives other bytes."""
    whole, other = Run(tiny_model, tmp_path / "whole"), Run(tiny_model, tmp_path / "other")
    whole.go()
    with pytest.raises(Interrupted):
        other.go(stop_at=5)
    other.config = replace(CONFIG, seed=12)
    other.go()
    assert any(not torch.equal(left, right) for left, right in zip(whole.weights().values(), other.weights().values()))


def test_stopping_again_at_once_keeps_the_checkpoint_as_it_is(tiny_model: Callable, tmp_path: Path):
    run = Run(tiny_model, tmp_path)
    with pytest.raises(Interrupted):
        run.go(stop_at=4)
    before = (tmp_path / "step-00000004" / "state.safetensors").stat().st_ino
    with pytest.raises(Interrupted):
        run.go(stop_at=4)
    assert (tmp_path / "step-00000004" / "state.safetensors").stat().st_ino == before
    assert run.saved == [4]


def test_a_finished_run_goes_through_without_a_step_and_knows_its_loss(tiny_model: Callable, tmp_path: Path):
    run = Run(tiny_model, tmp_path)
    first = run.go()
    weights = run.weights()
    second = run.go()
    assert_same_bytes(weights, run.weights())
    assert second.final_loss == first.final_loss
    assert second.num_tokens == 0


def test_a_loss_that_is_no_number_stops_at_a_named_step_and_keeps_the_last_checkpoint(tiny_model: Callable, tmp_path: Path):
    run = Run(tiny_model, tmp_path, config=replace(CONFIG, save_steps=2, max_tokens_per_pack=1000))
    calls = iter(range(100))

    def objective(tensors: dict[str, torch.Tensor]) -> LossSum:
        result = sft.loss(tensors)
        return replace(result, loss_sum=result.loss_sum * (math.nan if next(calls) == 4 else 1.0))

    with pytest.raises(TrainingError, match=r"step 5 \(loss nan.*rows \[") as caught:
        run.go(objective=objective)
    assert "learning_rate" in caught.value.remedy
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000004"]
    tensors, state = load_checkpoint(list_checkpoints(tmp_path)[-1])
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert state["step"] == 4
    assert all(torch.isfinite(tensor).all() for tensor in run.weights().values())


@pytest.mark.parametrize("keep", [1, 3])
def test_only_the_newest_checkpoints_are_kept(tiny_model: Callable, tmp_path: Path, keep: int):
    run = Run(tiny_model, tmp_path, config=replace(CONFIG, save_steps=3, keep_checkpoints=keep))
    run.go()
    assert run.saved == [3, 6, 9, 12]
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-{step:08d}" for step in run.saved[-keep:]]


def test_a_checkpoint_is_due_after_some_seconds(tiny_model: Callable, tmp_path: Path):
    run = Run(tiny_model, tmp_path, config=replace(CONFIG, save_seconds=1e-6))
    run.go()
    assert run.saved == list(range(1, NUM_STEPS + 1))


def test_rows_without_loss_are_an_error_before_anything_is_written(tiny_model: Callable, tmp_path: Path):
    loaded = tiny_model("llama")
    trainable = METHODS["full"].apply(loaded.model, FULL)
    silent = [Row(np.arange(5), np.zeros(5, dtype=np.float32))]
    for given in ([], silent):
        with pytest.raises(DataError, match="carries loss"):
            train(trainable.model, trainable.parameters, given, sft.loss, CONFIG, checkpoints=tmp_path / "none", emit=lambda event: None)
    assert not (tmp_path / "none").exists()


def test_a_checkpoint_of_another_method_is_refused_in_one_sentence(tiny_model: Callable, tmp_path: Path):
    run = Run(tiny_model, tmp_path)
    with pytest.raises(Interrupted):
        run.go(stop_at=2)
    for method in (replace_rank(8), FULL):
        run.method = method
        with pytest.raises(DataError, match="other parameters"):
            run.go()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002"]


def replace_rank(lora_r: int) -> MethodConfig:
    return DROPOUT_LORA.model_copy(update={"lora_r": lora_r})


def test_a_full_disk_is_named_and_the_old_checkpoint_stays(tiny_model: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = Run(tiny_model, tmp_path, config=replace(CONFIG, save_steps=3))
    with pytest.raises(Interrupted):
        run.go(stop_at=3)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(ResourceError, match="1 MB are free") as caught:
        run.go()
    assert caught.value.place == str(tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003"]
    monkeypatch.undo()
    assert run.go().num_steps == NUM_STEPS


def test_what_a_kill_left_half_written_is_no_checkpoint_and_is_swept_away(tiny_model: Callable, tmp_path: Path):
    run = Run(tiny_model, tmp_path)
    with pytest.raises(Interrupted):
        run.go(stop_at=4)
    torn = tmp_path / f".step-00000009.abc{PARTIAL}"
    torn.mkdir()
    (torn / "state.safetensors").write_bytes(b"half")
    without_record = tmp_path / "step-00000008"
    without_record.mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000004"]
    without_record.rmdir()
    run.go()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000012"]


def test_asked_to_stop_within_a_step_it_drops_that_step_and_goes_on_to_the_same_bytes(tiny_model: Callable, tmp_path: Path):
    """A step of many packs can take minutes; whoever sends SIGTERM does not wait so long."""
    config = replace(CONFIG, max_tokens_per_pack=30)
    whole, stopped = Run(tiny_model, tmp_path / "whole", config=config), Run(tiny_model, tmp_path / "stopped", config=config)
    whole.go()
    num_passes = 0

    def objective(tensors: dict[str, torch.Tensor]) -> LossSum:
        nonlocal num_passes
        num_passes += stopped.step_done() == 4
        return sft.loss(tensors)

    with pytest.raises(Interrupted):
        stopped.go(objective=objective, should_stop=lambda: num_passes == 1)
    assert num_passes == 1
    assert stopped.step_done() == 4
    assert [path.name for path in list_checkpoints(tmp_path / "stopped")] == ["step-00000004"]
    stopped.go()
    assert_same_bytes(whole.weights(), stopped.weights())
    assert whole.losses() == stopped.losses()


def test_how_long_steps_waited_for_their_rows_is_measured(tiny_model: Callable, tmp_path: Path):
    run = Run(tiny_model, tmp_path)
    result = run.go()
    shares = [event.data["wait_share"] for event in run.events if event.kind == "step"]
    assert len(shares) == NUM_STEPS
    assert all(0 <= share < 1 for share in shares)
    assert min(shares) <= result.wait_share <= max(shares)
    assert f"waited for their rows and packs {result.wait_share:.1%} of the time" in run.events[-1].message


def test_rows_that_come_late_are_seen(tiny_model: Callable, tmp_path: Path):
    """Planted: it takes longer to get the rows of a step ready than to compute with them."""
    run = Run(tiny_model, tmp_path)
    run.options = {"corrupt": lambda rows, step: time.sleep(0.3) or list(rows)}
    assert run.go().wait_share > 0.3


def test_packs_that_take_long_are_seen(tiny_model: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Planted: rows are laid out in the step, and that takes longer than to compute with them."""
    pack = passes.pack
    monkeypatch.setattr(passes, "pack", lambda rows: time.sleep(0.3) or pack(rows))
    assert Run(tiny_model, tmp_path).go().wait_share > 0.3


# ---- rows that are drawn in a step -------------------------------------------------------------------------------------


def drawn_four_times(rows: Sequence[Row], number: int) -> Rollout:
    """More rows than the plan has for the step: four answers to each."""
    return Rollout([[replace(row, extras={}) for row in rows for _ in range(4)]])


def test_a_drawn_row_that_does_not_fit_is_called_by_its_request(tiny_model: Callable, tmp_path: Path):
    run = Run(tiny_model, tmp_path, config=replace(CONFIG, batch_rows=8))
    run.rows[3] = replace(run.rows[3], name="letter-3")
    run.options = {"draw": drawn_four_times}

    def objective(tensors: dict[str, torch.Tensor]) -> LossSum:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ResourceError, match="A single row of 30 tokens does not fit into memory") as caught:
        run.go(objective=objective)
    assert caught.value.place == "letter-3"


def test_a_drawn_row_without_a_finite_loss_is_called_by_its_request(tiny_model: Callable, tmp_path: Path):
    run = Run(tiny_model, tmp_path, config=replace(CONFIG, batch_rows=8))
    broken = int(run.rows[2].input_ids[3])
    clean = [replace(row, input_ids=np.where(row.input_ids == broken, 301, row.input_ids)) for row in run.rows]
    run.rows = [*clean[:2], run.rows[2], *clean[3:]]
    run.prepare = lambda model: model.get_input_embeddings().weight.data[broken].fill_(float("nan"))
    run.options = {"draw": drawn_four_times}
    with pytest.raises(TrainingError, match=r"step 1 \(loss nan.*rows \[row 2\]\)"):
        run.go()


def test_an_evaluation_does_not_undo_a_reason_to_stop(tiny_model: Callable, tmp_path: Path):
    run = Run(tiny_model, tmp_path, config=replace(CONFIG, eval_steps=1))
    run.options = {
        "draw": lambda rows, number: Rollout([list(rows)], stop="it learns to please the reward" if number == 2 else ""),
        "validate": lambda: 1.0,
    }  # fmt: skip
    result = run.go()
    assert (result.num_steps, result.stopped_early) == (3, "it learns to please the reward")
    assert run.go().num_steps == 3


# ---- checkpoints that cannot be read -----------------------------------------------------------------------------------


def cut_short(checkpoint: Path) -> None:
    file = checkpoint / "state.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without_tensors(checkpoint: Path) -> None:
    (checkpoint / "state.safetensors").unlink()


def without_record(checkpoint: Path) -> None:
    (checkpoint / "state.json").write_text("{")


spoiled = pytest.mark.parametrize("spoil", [cut_short, without_tensors, without_record], ids=lambda spoil: spoil.__name__)


def killed_behind_two_checkpoints(tiny_model: Callable, folder: Path) -> Run:
    run = Run(tiny_model, folder, config=replace(CONFIG, save_steps=2))
    with pytest.raises(KilledError):
        run.go(die_at=5)
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000002", "step-00000004"]
    return run


@spoiled
def test_a_checkpoint_that_cannot_be_read_is_left_out_and_the_bytes_are_the_same(tiny_model: Callable, tmp_path: Path, spoil: Callable):
    whole = Run(tiny_model, tmp_path / "whole")
    whole.go()
    run = killed_behind_two_checkpoints(tiny_model, tmp_path / "spoiled")
    spoil(tmp_path / "spoiled" / "step-00000004")
    run.events.clear()
    run.go()
    told = [event.message for event in run.events if event.kind == "notice"]
    (left_out,) = [message for message in told if message.startswith("This checkpoint cannot be read: ")]
    assert left_out.endswith(f"({tmp_path / 'spoiled' / 'unreadable-step-00000004'}). It is left out: step-00000002 is taken up")
    assert "going on from step 2 of 12" in told
    assert_same_bytes(whole.weights(), run.weights())


@spoiled
def test_where_no_checkpoint_can_be_read_one_sentence_names_a_folder(tiny_model: Callable, tmp_path: Path, spoil: Callable):
    run = killed_behind_two_checkpoints(tiny_model, tmp_path)
    for path in list_checkpoints(tmp_path):
        spoil(path)
    with pytest.raises(DataError, match="This checkpoint cannot be read: ") as caught:
        run.go()
    assert caught.value.place == str(tmp_path / "step-00000002")
    assert "\n" not in str(caught.value)
    assert len(list_checkpoints(tmp_path)) == 2


def test_a_checkpoint_that_was_left_out_does_not_push_out_a_good_one(tiny_model: Callable, tmp_path: Path):
    """Its number is the highest until the run has come as far again."""
    run = killed_behind_two_checkpoints(tiny_model, tmp_path)
    cut_short(tmp_path / "step-00000004")
    run.events.clear()
    with pytest.raises(Interrupted):
        run.go(stop_at=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert (tmp_path / "unreadable-step-00000004").is_dir()
    assert run.go().num_steps == NUM_STEPS
