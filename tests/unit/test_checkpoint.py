"""Checkpoints: written behind the training, announced when they are on the disk, refused in one sentence before it is too late."""

from __future__ import annotations

import resource
import shutil
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_loop import CONFIG, FULL, KilledError, Run

from giong.engine.checkpoint import (
    CheckpointWriter,
    best_checkpoint,
    list_checkpoints,
    load_checkpoint,
    num_bytes,
    prove_saving,
    prune_checkpoints,
    require_room_for_run,
    save_checkpoint,
)
from giong.errors import ResourceError
from giong.workspace import ROOM_BYTES

TENSORS = {"master/w": torch.arange(6.0).reshape(2, 3), "adamw/step/w": torch.tensor(3.0), "adamw/exp_avg/w": torch.full((2, 3), torch.nan)}
SMALL = {"master/w": torch.ones(4)}


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Within it the system refuses larger files, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Announced:
    """What a writer announced: (step, was it on the disk, by this thread)."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, []

    def __call__(self, step: int, state: object) -> None:
        on_disk = f"step-{step:08d}" in [path.name for path in list_checkpoints(self.folder)]
        self.seen.append((step, on_disk, threading.current_thread() is threading.main_thread()))


def test_what_is_written_is_what_the_tensors_were_when_it_was_asked_for(tmp_path: Path):
    """They change at once, as training does; without a copy the file would hold the change (or half of it)."""
    tensors = {"master/w": torch.zeros(8_000_000)}
    announced = Announced(tmp_path)
    with CheckpointWriter(tmp_path, 2, announced) as writer:
        writer.save(5, tensors, {"loss": 1.0})
        tensors["master/w"].add_(1.0)
    assert announced.seen == [(5, True, True)]
    stored, state = load_checkpoint(tmp_path / "step-00000005")
    assert not stored["master/w"].any()
    assert state == {"step": 5, "loss": 1.0}


def test_steps_are_announced_in_order_and_each_once(tmp_path: Path):
    announced = Announced(tmp_path)
    with CheckpointWriter(tmp_path, 2, announced) as writer:
        for step in (2, 4, 6):
            writer.save(step, SMALL, {})
            writer.poll()
    assert announced.seen == [(step, True, True) for step in (2, 4, 6)]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000004", "step-00000006"]


def test_a_failed_write_is_one_error_and_the_old_checkpoint_stays(tmp_path: Path):
    announced = Announced(tmp_path)
    large = {"master/w": torch.ones(100_000)}
    with pytest.raises(ResourceError, match="larger than the system allows") as caught, CheckpointWriter(tmp_path, 1, announced) as writer:
        writer.save(1, SMALL, {})
        with file_size_limit(200_000):
            writer.save(2, large, {})
            writer.wait()
    assert caught.value.place == str(tmp_path / "step-00000002")
    assert announced.seen == [(1, True, True)]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_failed_write_is_not_lost_behind_another_error(tmp_path: Path):
    with file_size_limit(200_000), pytest.raises(KilledError) as caught, CheckpointWriter(tmp_path, 1, Announced(tmp_path)) as writer:
        writer.save(2, {"master/w": torch.ones(100_000)}, {})
        raise KilledError
    assert "larger than the system allows" in caught.value.__notes__[0]


def test_a_failed_write_stops_a_run_at_its_first_step_and_not_at_its_first_checkpoint(tiny_model: Callable, tmp_path: Path):
    run = Run(tiny_model, tmp_path, FULL, replace(CONFIG, num_epochs=40))
    tiny_model("llama")
    with file_size_limit(300_000), pytest.raises(ResourceError, match="larger than the system allows") as caught:
        run.go()
    assert caught.value.place == str(tmp_path)
    assert run.saved == []
    assert 1 <= run.step_done() < 120
    assert list(tmp_path.iterdir()) == []


def test_the_proof_reads_back_every_byte_and_leaves_nothing(tmp_path: Path):
    prove_saving(tmp_path, TENSORS, {"loss": 0.1, "watch": {"best": None}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="mapped pages are counted in /proc")
def test_the_proof_does_not_hold_the_whole_file_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from giong.engine import checkpoint

    def mapped_bytes() -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
        return int(line.split()[1]) * 1024

    seen, same = [], checkpoint._same_bytes
    monkeypatch.setattr(checkpoint, "_same_bytes", lambda left, right: [same(left, right), seen.append(mapped_bytes())][0])
    tensors = {f"matrix.{number}": torch.full((1024, 1024), float(number)) for number in range(8)}
    prove_saving(tmp_path, tensors, {})
    assert max(seen) - min(seen) < 8 * 2**20, "each tensor is 4 MiB, all of them 32"


def test_a_disk_that_gives_back_other_bytes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The planted lie: one byte flips between writing and reading."""
    from giong.engine import checkpoint

    written = checkpoint.save_file

    def lie(tensors: dict[str, torch.Tensor], path: Path) -> None:
        written(tensors, path)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(checkpoint, "save_file", lie)
    with pytest.raises(ResourceError, match="does not read back") as caught:
        prove_saving(tmp_path, TENSORS, {})
    assert caught.value.place == str(tmp_path)


def test_a_disk_that_gives_back_what_is_no_file_of_ours_is_named_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The planted lie: the half of it comes back."""
    from giong.engine import checkpoint

    written = checkpoint.save_file

    def lie(tensors: dict[str, torch.Tensor], path: Path) -> None:
        written(tensors, path)
        path.write_bytes(path.read_bytes()[:-8])

    monkeypatch.setattr(checkpoint, "save_file", lie)
    with pytest.raises(ResourceError, match="does not read back"):
        prove_saving(tmp_path, TENSORS, {})


@pytest.mark.parametrize(("step_of_best", "expected"), [(1, [1, 4, 5]), (4, [4, 5]), (None, [4, 5])])
def test_the_best_is_kept_beside_the_newest(tmp_path: Path, step_of_best: int | None, expected: list[int]):
    for step in range(1, 6):
        loss = {} if step_of_best is None else {"validation_loss": 0.5 if step == step_of_best else 1.0 + step / 100}
        save_checkpoint(tmp_path, step, SMALL, loss, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-{step:08d}" for step in expected]
    assert best_checkpoint(tmp_path) == (tmp_path / f"step-{step_of_best:08d}" if step_of_best else None)
    prune_checkpoints(tmp_path, 1)
    assert len(list_checkpoints(tmp_path)) == (2 if step_of_best == 1 or step_of_best == 4 else 1)


def test_a_run_measures_the_validation_loss_and_keeps_the_best(tiny_model: Callable, tmp_path: Path):
    """Checkpoints that the clock asks for (here: all) are not measured."""
    run = Run(tiny_model, tmp_path, config=replace(CONFIG, eval_steps=3, save_seconds=1e-9, keep_checkpoints=1))
    losses, modes = iter([3.0, 1.0, float("nan"), 2.0]), []

    def validate() -> float:
        modes.append((run.trainable.model.training, torch.is_grad_enabled()))
        return next(losses)

    run.options = {"validate": validate}
    result = run.go()
    assert modes == [(False, False)] * 4
    assert (result.validation_loss, result.best_step) == (1.0, 6)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000006", "step-00000012"]
    assert best_checkpoint(tmp_path) == tmp_path / "step-00000006"
    told = [event.data for event in run.events if event.kind == "checkpoint" and "validation_loss" in event.data]
    assert told == [{"step": step, "validation_loss": loss} for step, loss in zip((3, 6, 9, 12), (3.0, 1.0, None, 2.0))]


@pytest.mark.parametrize("best", [2, 4, 12])
def test_the_best_weights_become_the_models(tiny_model: Callable, tmp_path: Path, best: int):
    """They are those of a run that was stopped there; asked again when all is done, the answer is the same."""
    config = replace(CONFIG, eval_steps=2, load_best_model_at_end=True, keep_checkpoints=1)
    chosen = Run(tiny_model, tmp_path / "chosen", FULL, config)
    losses = iter(range(20, 0, -1)) if best == 12 else iter([1.0 if step == best else 2.0 for step in range(2, 13, 2)])
    chosen.options = {"validate": lambda: float(next(losses))}
    assert chosen.go().best_step == best
    stored, _ = load_checkpoint(tmp_path / "chosen" / f"step-{best:08d}")
    found = {name: parameter.detach().clone() for name, parameter in chosen.trainable.parameters.items()}
    assert all(torch.equal(found[name], stored[f"master/{name}"].to(found[name].dtype)) for name in found)
    again = Run(tiny_model, tmp_path / "chosen", FULL, config)
    again.options = {"validate": lambda: pytest.fail("nothing is left to measure")}
    assert again.go().best_step == best
    assert all(torch.equal(parameter, found[name]) for name, parameter in again.trainable.parameters.items())


def test_measuring_changes_no_byte_of_the_run(tiny_model: Callable, tmp_path: Path):
    plain, measured = (Run(tiny_model, tmp_path / name, config=replace(CONFIG, eval_steps=2)) for name in ("plain", "measured"))
    measured.options = {"validate": lambda: float(torch.rand(()))}
    plain.go()
    measured.go()
    assert plain.losses() == measured.losses()


def test_room_for_all_checkpoints_is_asked_for_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")
    needed_bytes = 1_000_000 * (12 * 3 + 2 * 4)

    def free(num_bytes: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - num_bytes, num_bytes))

    folder = tmp_path / "not" / "yet"
    free(needed_bytes + ROOM_BYTES)
    require_room_for_run(folder, 1_000_000, num_kept=2)
    free(needed_bytes + ROOM_BYTES - 1)
    with pytest.raises(ResourceError, match="3 checkpoints and the trained model take 44 MB and some room, 60.8 MB are free") as caught:
        require_room_for_run(folder, 1_000_000, num_kept=2)
    assert caught.value.place == str(folder)
    assert not (tmp_path / "not").exists()
    # What lies there already is replaced and needs no room again.
    tensors = {"master/w": torch.ones(1000)}
    save_checkpoint(folder, 1, tensors, {}, keep=2)
    require_room_for_run(folder, 1_000_000, num_kept=2)
    assert num_bytes(tensors) == 4000


def test_a_run_that_finds_the_disk_full_later_says_so_and_keeps_what_it_has(
    tiny_model: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = Run(tiny_model, tmp_path, config=replace(CONFIG, save_steps=3))
    usage = namedtuple("usage", "total used free")
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 0) if run.step_done() > 5 else real(path))
    with pytest.raises(ResourceError, match="0 MB are free"):
        run.go()
    assert run.saved == [3]
    assert run.step_done() == 6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_where_memory_is_short_no_copy_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from giong.engine import checkpoint
    from giong.sizing.hardware import this_machine

    machine = replace(this_machine(), available_memory_bytes=2 * num_bytes(TENSORS))
    monkeypatch.setattr(checkpoint, "this_machine", lambda: machine)
    announced = Announced(tmp_path)
    with CheckpointWriter(tmp_path, 2, announced) as writer:
        writer.save(1, TENSORS, {})
        # Written when the call returns: the tensors themselves may change now.
        assert announced.seen == [(1, True, True)]
