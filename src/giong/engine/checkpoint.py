"""Checkpoints of a training run: one folder per step, whole or absent; the newest K and the best are kept.

A checkpoint holds the fp32 masters, the optimizer's state and the number of the step; order and dropout follow from the
seed and that number, so nothing else is needed to go on to the same bytes.

Writing happens behind the training: the tensors are copied in memory and a thread writes the copy (safetensors writes without
Python's lock). One write at a time, and the next one waits for it: skipping would let the disk's speed decide which
checkpoints exist. A checkpoint is announced when it is on the disk, by the thread that trains.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from giong.errors import DataError, GiongError, ResourceError
from giong.models.saving import system_errors
from giong.sizing.hardware import this_machine
from giong.workspace import PARTIAL, atomic_folder, read_json, remove_folder, require_room, resource_errors, sweep_leftovers, write_json

BYTES_PER_PARAMETER = 12
"""fp32 master and AdamW's two moments; Muon's matrices have one."""
BYTES_PER_TRAINED_NUMBER = 2 * 4
"""What was trained is saved with its run and again as the model, in fp32 at most."""

Tensors = Mapping[str, torch.Tensor]


def save_checkpoint(folder: Path, step: int, tensors: Tensors, state: Mapping[str, Any], keep: int) -> Path:
    """Write `folder`/step-NNNNNNNN and remove all but the newest `keep` and the best."""
    path = folder / f"step-{step:08d}"
    with atomic_folder(path) as temporary:
        _write(temporary, tensors, {"step": step, **state})
    prune_checkpoints(folder, keep)
    return path


def _write(folder: Path, tensors: Tensors, state: Mapping[str, Any]) -> None:
    with system_errors():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "state.safetensors")
    write_json(folder / "state.json", state)


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` and the best. One that cannot be removed only takes room."""
    best = best_checkpoint(folder)
    for old in list_checkpoints(folder)[:-keep]:
        if old != best:
            with contextlib.suppress(OSError):
                remove_folder(old)


def set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint that cannot be read, and return its new place: while it counts as the newest it pushes out good ones."""
    aside = checkpoint.with_name(f"unreadable-{checkpoint.name}")
    with resource_errors(checkpoint):
        if aside.exists():
            remove_folder(aside)
        os.replace(checkpoint, aside)
    return aside


def tidy_checkpoints(folder: Path, keep: int) -> None:
    """Before a run: remove what a kill left, half of a write or one checkpoint too many."""
    if folder.is_dir():
        sweep_leftovers(folder, recursive=False)
        prune_checkpoints(folder, keep)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the lowest validation loss; None where none was measured."""
    losses = _validation_losses(folder)
    return min(losses, key=lambda path: losses[path]) if losses else None


def lowest_validation_loss(folder: Path) -> tuple[float | None, int | None]:
    """That of the best checkpoint, and its step."""
    best = best_checkpoint(folder)
    if best is None:
        return None, None
    state = read_json(best / "state.json")
    return state["validation_loss"], state["step"]


def _validation_losses(folder: Path) -> dict[Path, float]:
    losses: dict[Path, float | None] = {}
    for path in list_checkpoints(folder):
        # One that cannot be read is not the best; whoever takes it up says what is wrong.
        with contextlib.suppress(DataError, OSError):
            losses[path] = read_json(path / "state.json").get("validation_loss")
    return {path: loss for path, loss in losses.items() if loss is not None}


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and state of one checkpoint. Raises DataError where it cannot be read."""
    with reading(path):
        return load_file(path / "state.safetensors"), read_json(path / "state.json")


@contextlib.contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Around the reading of a checkpoint: one sentence that names its folder in the place of whatever the files' formats raise."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, AssertionError) as error:
        words = error.message if isinstance(error, GiongError) else str(error) or type(error).__name__
        raise DataError(
            f"This checkpoint cannot be read: {words.splitlines()[0]}", place=str(checkpoint),
            remedy="Put a copy of it back, or delete its folder: the run goes on from the one before it, or begins anew.",
        ) from error  # fmt: skip


def prove_saving(folder: Path, tensors: Tensors, state: Mapping[str, Any]) -> None:
    """Write a checkpoint where checkpoints go, read it back, compare, and take it away again.

    Raises ResourceError for what the system refuses, and when other bytes come back than were given.
    """
    with resource_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".step-proof.", suffix=PARTIAL) as name:
            temporary = Path(name)
            _write(temporary, tensors, state)
            with (temporary / "state.safetensors").open("rb") as stream:
                # Some file systems refuse only now.
                os.fsync(stream.fileno())
            same = False
            with contextlib.suppress(DataError), reading(temporary):
                same = _reads_back(temporary / "state.safetensors", tensors) and read_json(temporary / "state.json") == state
    if not same:
        raise ResourceError(
            "A checkpoint does not read back as it was written", place=str(folder), remedy="Check the disk, or train on another one."
        )


def _reads_back(file: Path, tensors: Tensors) -> bool:
    """Whether the file holds just these tensors."""
    with safe_open(file, "pt") as stored:
        if set(stored.keys()) != set(tensors):
            return False
    for name, tensor in tensors.items():
        # The file is mapped, and what has been read stays in memory until it is closed: a second whole copy might not fit.
        with safe_open(file, "pt") as stored:
            if not _same_bytes(stored.get_tensor(name), tensor):
                return False
    return True


def _same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    # As bytes, because a NaN is not equal to itself.
    as_bytes = [tensor.cpu().contiguous().view(-1).view(torch.uint8) for tensor in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*as_bytes)


def require_room_for_run(folder: Path, num_parameters: int, num_kept: int) -> None:
    """Before anything is computed: room for all checkpoints that will lie there at once, the one being written included, and for what
    is saved at the end."""
    present_bytes = sum(file.stat().st_size for path in list_checkpoints(folder) for file in path.iterdir())
    needed_bytes = num_parameters * (BYTES_PER_PARAMETER * (num_kept + 1) + BYTES_PER_TRAINED_NUMBER) - present_bytes
    require_room(folder, max(0, needed_bytes), f"{num_kept + 1} checkpoints and the trained model take")


def num_bytes(tensors: Tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class CheckpointWriter:
    """Writes checkpoints in a thread. A write that failed raises its error in the next call, or when the block is left.

    `announce(step, state)` is called, by the thread that trains, once the checkpoint of that step is on the disk.
    """

    def __init__(self, folder: Path, keep: int, announce: Callable[[int, Mapping[str, Any]], None]) -> None:
        self.folder, self.keep, self.announce = folder, keep, announce
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[Future, int | None, Mapping[str, Any]] | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is KeyboardInterrupt:
            # "At once" does not wait for a disk; what is half-written is swept away by the next run.
            self._pool.shutdown(wait=False)
            return
        self._pool.shutdown()
        if error is None:
            self.wait()
        elif self._pending and (failure := self._pending[0].exception()):
            error.add_note(f"A checkpoint could not be written either: {failure}")
        else:
            self.wait()

    def save(self, step: int, tensors: Tensors, state: Mapping[str, Any]) -> None:
        """Take the tensors as they are now and begin to write them; waits for the write before."""
        self.wait()
        require_room(self.folder, num_bytes(tensors), "a checkpoint takes")
        self._begin(step, tensors, state, lambda copied: save_checkpoint(self.folder, step, copied, state, self.keep))

    def prove(self, tensors: Tensors, state: Mapping[str, Any]) -> None:
        """Begin a proof that saving works; its failure surfaces as that of a write."""
        self.wait()
        self._begin(None, tensors, state, lambda copied: prove_saving(self.folder, copied, state))

    def _begin(self, step: int | None, tensors: Tensors, state: Mapping[str, Any], write: Callable[[Tensors], Any]) -> None:
        available_bytes = this_machine().available_memory_bytes
        # Where a copy would take more than half of what memory is left, the training waits for the disk instead.
        fits = available_bytes is None or 2 * num_bytes(tensors) < available_bytes
        copied = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()} if fits else tensors
        self._pending = (self._pool.submit(write, copied), step, state)
        if not fits:
            self.wait()

    def poll(self) -> None:
        """Announce a write that has finished, raise the error of one that has failed; does not wait."""
        if self._pending and self._pending[0].done():
            self.wait()

    def wait(self) -> None:
        """Wait for the write under way, if any, and announce it. Raises its error."""
        if self._pending:
            (future, step, state), self._pending = self._pending, None
            future.result()
            if step is not None:
                self.announce(step, state)
