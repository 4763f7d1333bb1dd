"""Checkpoints of many processes: written by one for adapters, by all for sharded training, and read by any other number.

Sharded tensors go through torch.distributed.checkpoint, which finds out at reading which part of which file a process needs. Its
safetensors storage is used and not its own files, whose index is a pickle: giong reads safetensors and JSON alone. The folder
is the same as that of one process but for the number of files, and appears whole or not at all.

One decision a reader may question: each process reads by itself, without the messages that torch.distributed.checkpoint would
exchange. It needs none to read, and a failure is then an ordinary one that all are told of (`Processes.each`).
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from giong.engine.checkpoint import CheckpointWriter, load_checkpoint, num_bytes, prune_checkpoints, reading
from giong.engine.distributed import Processes, is_spread, local
from giong.engine.optimizer import MasterOptimizer
from giong.errors import DataError, ResourceError
from giong.workspace import PARTIAL, atomic_folder, read_json, require_room, resource_errors, write_json

Tensors = Mapping[str, torch.Tensor]
Announce = Callable[[int, Mapping[str, Any]], None]

WHOLE_FILE = "state.safetensors"
"""What one process writes."""


def checkpoint_writer(folder: Path, keep: int, announce: Announce, processes: Processes) -> CheckpointWriter:
    """The writer of this process: an ordinary one, one of several that write a part each, or one that leaves it to the first."""
    if processes.sharded:
        return ShardedWriter(folder, keep, announce, processes)
    return CheckpointWriter(folder, keep, announce) if processes.is_first else SilentWriter(folder, keep, announce)


class SilentWriter(CheckpointWriter):
    """Writes nothing: what it would write is in the first process too."""

    def save(self, step: int, tensors: Tensors, state: Mapping[str, Any]) -> None:
        pass

    def prove(self, tensors: Tensors, state: Mapping[str, Any]) -> None:
        pass


class ShardedWriter(CheckpointWriter):
    """Writes the shards of all processes into one folder, which the first one commits. The folder must be one that all see.

    The threads that write meet in a process group of their own: the training goes on in the other one meanwhile.
    """

    def __init__(self, folder: Path, keep: int, announce: Announce, processes: Processes) -> None:
        super().__init__(folder, keep, announce)
        self._processes = processes
        self._group = dist.new_group(backend="gloo")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            super().__exit__(kind, error, trace)
        finally:
            if kind is not KeyboardInterrupt:
                dist.destroy_process_group(self._group)

    def save(self, step: int, tensors: Tensors, state: Mapping[str, Any]) -> None:
        self.wait()
        self._processes.first(lambda: require_room(self.folder, num_bytes(tensors), "a checkpoint takes"))
        self._begin(step, tensors, state, lambda copied: self._save(step, copied, state))

    def prove(self, tensors: Tensors, state: Mapping[str, Any]) -> None:
        self.wait()
        self._begin(None, tensors, state, lambda copied: self._prove(copied))

    def poll(self) -> None:
        # All meet a failure in the same step, or one would leave while the others compute on.
        if self._processes.any(self._pending is not None and self._pending[0].done()):
            self.wait()

    def _save(self, step: int, tensors: Tensors, state: Mapping[str, Any]) -> None:
        path = self.folder / f"step-{step:08d}"
        with contextlib.ExitStack() as stack:

            def commit(temporary: Path) -> None:
                write_json(temporary / "state.json", {"step": step, **state})
                stack.close()
                prune_checkpoints(self.folder, self.keep)

            temporary = self._first(lambda: stack.enter_context(atomic_folder(path)))
            self._write(temporary, tensors)
            self._first(lambda: commit(temporary))

    def _prove(self, tensors: Tensors) -> None:
        """Write, read back and compare each process's own part."""

        def make() -> Path:
            with resource_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                return Path(tempfile.mkdtemp(dir=self.folder, prefix=".step-proof.", suffix=PARTIAL))

        temporary = self._first(make)
        try:
            self._write(temporary, tensors)
            stored, same = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, False
            with contextlib.suppress(DataError), reading(temporary):
                _read_shards(temporary, stored)
                same = all(_same_bytes(stored[name], tensors[name]) for name in tensors)
            dist.all_gather_object(every := [None] * self._processes.size, same, group=self._group)
        finally:
            if self._processes.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
        if not all(every):
            raise ResourceError(
                "A checkpoint does not read back as it was written",
                place=str(self.folder),
                remedy="Check the disk, or train on another one.",
            )

    def _first(self, function: Callable[[], Any]) -> Any:
        return self._processes.first(function, self._group)

    def _write(self, folder: Path, tensors: Tensors) -> None:
        import torch.distributed.checkpoint as dcp

        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        try:
            dcp.save(dict(tensors), storage_writer=writer, process_group=self._group)
        except dcp.CheckpointException as error:
            # It is no Exception, and carries what each process met.
            met = [failure for failure, _ in error.failures.values()]
            refused = next((failure for failure in met if isinstance(failure, OSError)), None)
            if refused is None:
                raise RuntimeError(f"a sharded checkpoint could not be written: {met[0]}") from error
            with resource_errors(folder):
                raise refused from error


def _same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    # As bytes, because a NaN is not equal to itself.
    return torch.equal(*(local(tensor).contiguous().view(-1).view(torch.uint8) for tensor in (left, right)))


def read_checkpoint(path: Path, optimizer: MasterOptimizer, processes: Processes) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and state of a checkpoint, whatever number of processes wrote it, spread as `optimizer` is spread.

    Adapters are read by the first process and handed on; sharded tensors are read by each process, which needs to see the folder.
    Raises DataError, in all processes, where one of them cannot read it.
    """
    if not processes.sharded and processes.first(lambda: (path / WHOLE_FILE).is_file()):
        return processes.first(lambda: load_checkpoint(path))
    tensors: dict[str, torch.Tensor] = {}
    state: dict[str, Any] = {}

    def read() -> None:
        with reading(path):
            tensors.update(_empty_tensors(path, optimizer))
            _read_shards(path, tensors)
            state.update(read_json(path / "state.json"))

    processes.each(read)
    return tensors, state


def _empty_tensors(path: Path, optimizer: MasterOptimizer) -> dict[str, torch.Tensor]:
    """What is to be filled from the files of a checkpoint: shards where the optimizer has shards, whole tensors elsewhere."""
    import torch.distributed.checkpoint as dcp

    found = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    # What no file holds would be left at zero in silence.
    if not found or any(sum(chunk.sizes.numel() for chunk in stored.chunks) < stored.size.numel() for stored in found.values()):
        raise FileNotFoundError("a part of it is missing")
    tensors: dict[str, torch.Tensor] = {}
    for key, stored in found.items():
        master = optimizer.masters.get(key.removeprefix("master/") if key.startswith("master/") else key.split("/", 2)[2])
        if master is not None and is_spread(master) and master.shape == stored.size:
            tensors[key] = torch.zeros_like(master, requires_grad=False)
        else:
            tensors[key] = torch.zeros(stored.size, dtype=stored.properties.dtype)
    return tensors


def _read_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill this process's part of the tensors from the files of a folder."""
    import torch.distributed.checkpoint as dcp

    # It warns of being alone, which is what is wanted. Not within a block: threads share the filters.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    try:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    except dcp.CheckpointException as error:
        # It is no Exception, and carries what was met.
        raise next(iter(error.failures.values()))[0] from error
