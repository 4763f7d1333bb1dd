"""Start a worker process, follow its events, and turn its end into a result or an error.

The worker gets allocator settings that keep freed memory: glibc would otherwise give every large tensor back to the
system and fault it in again, page by page, at the next step (see docs/decisions/0002-allocator.md).
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from giong import errors
from giong.config import load, with_settings
from giong.contracts import SAME_REQUEST_SECONDS, TRAINING_STEPS, Emit, Event
from giong.errors import GiongError, Interrupted, ResourceError
from giong.journal import Journal
from giong.workspace import Project

ALLOCATOR = {
    # 32 MiB is the largest threshold glibc accepts; a larger value is ignored, and setting only the other two would
    # freeze the threshold at 128 KiB: every larger tensor would be mapped anew.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 1024 * 1024),
    "MALLOC_TRIM_THRESHOLD_": str(128 * 1024**2),
    "MALLOC_TOP_PAD_": str(64 * 1024 * 1024),
    # Small chunks that a thread keeps for itself lie between the freed activations of two layers and hold their pages apart, so that
    # the next pack finds no room in the heap; pages of 2 MiB are faulted in 512 times as seldom. In one arena the threads that compute
    # passes side by side find what the others freed.
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0:glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1",
    # Packs differ in length at every step, which leaves holes in fixed segments of a GPU's memory.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
STDERR_LINES = 40
SECOND_REQUEST_SECONDS = SAME_REQUEST_SECONDS + 0.5
"""How long after the first a second request to stop is passed on: the worker may have been late to see the first."""
SHUTDOWN_SECONDS = 300
"""How long torchrun lets processes that it has asked to stop finish a pack and write their shards; its own 30 s are too few for that."""


def worker_environment(num_processes: int = 1) -> dict[str, str]:
    """This process's environment with the allocator's settings; what the user set stays.

    Several processes divide the cores: torchrun would give each a single thread. It also would soon kill who is asked to stop.
    """
    quiet = {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error"}
    launched = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_processes)), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS),
    }  # fmt: skip
    return {**ALLOCATOR, **quiet, **(launched if num_processes > 1 else {}), **os.environ}


def worker_command(command: str, *options: str, num_processes: int = 1) -> list[str]:
    """With several processes torchrun starts them, and ends the others when one dies."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes), "-m"] if num_processes > 1 else []
    return [sys.executable, "-m", *launcher, "giong.worker", command, *options]


def run_story(
    project: Path,
    steps: Sequence[str],
    emit: Emit,
    *,
    force: bool = False,
    settings: Mapping[str, Any] | None = None,
    num_processes: int | None = None,
) -> None:
    """Run steps in a worker and pass its events on. `settings` (by dotted name) stand in for those of giong.yaml this once.

    `num_processes` stands in for `train.num_processes`, and is refused where that would be. Raises the worker's GiongError; Ctrl-C waits
    for its checkpoint.
    """
    settings = {**(settings or {}), **({"train.num_processes": num_processes} if num_processes else {})}
    config = with_settings(load(Project(project).config_path), settings)
    # A walk without steps that several processes can share starts one.
    num_processes = config.train.num_processes if TRAINING_STEPS & set(steps) else 1
    options = ["--project", str(project), "--steps", ",".join(steps), *(["--force"] if force else [])]
    if settings:
        options += ["--settings", json.dumps(settings)]
    events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
    error: GiongError | None = None
    with _SignalsPassedOn(events) as signals:
        process = subprocess.Popen(
            worker_command("story", *options, num_processes=num_processes), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
            errors="replace", env=worker_environment(num_processes), start_new_session=True,
        )  # fmt: skip
        signals.to(process)
        last_words, reader = _read(process, events)
        stage = "story"
        try:
            while event := events.get():
                stage = event.stage if event.kind == "stage_started" else stage
                if event.kind == "error":
                    error = errors.from_dict(event.data)
                else:
                    emit(event)
        except BaseException:
            # Whoever stops listening stops the work too: it would go on unseen.
            process.terminate()
            raise
        # What it left running may hold its standard error open.
        reader.join(timeout=1)
        process.wait()
    if error:
        error.add_note("\n".join(last_words))
        raise error
    if process.returncode and signals.num_sent:
        raise Interrupted("Stopped at once", remedy="Run the same command again: it goes on from the last checkpoint.")
    if process.returncode:
        error = _unexpected(process.returncode, last_words)
        if process.returncode < 0 and not isinstance(error, Interrupted):
            # Killed, the worker had no time to say it in the journal.
            with contextlib.suppress(GiongError, OSError):
                Journal(Project(project)).record_failure(stage, error, load(Project(project).config_path))
        raise error


class _SignalsPassedOn:
    """While it is entered, Ctrl-C and SIGTERM go to the worker (twice, then SIGKILL) instead of tearing this process from its work.

    The worker has a session of its own, so the terminal's Ctrl-C reaches only us. A handler and not KeyboardInterrupt, which
    would also strike between reading an event and showing it, or before the worker is known.
    """

    def __init__(self, events: queue.SimpleQueue[Event | None]) -> None:
        self._events = events
        self._process: subprocess.Popen[str] | None = None
        self._previous: dict[int, Any] = {}
        self._num_wanted = 0
        self._first_sent = 0.0
        self.num_sent = 0

    def __enter__(self) -> _SignalsPassedOn:
        # Python handles signals in the main thread only; elsewhere whoever has that thread decides.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *reason: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def to(self, process: subprocess.Popen[str]) -> None:
        """Name the worker; what came before is passed on now."""
        self._process = process
        self._pass_on()

    def _on_signal(self, number: int, frame: object) -> None:
        self._num_wanted += 1
        self._pass_on()

    def _pass_on(self) -> None:
        while self._process and self.num_sent < self._num_wanted:
            self.num_sent += 1
            if self.num_sent == 1:
                self._first_sent = time.monotonic()
            elif self.num_sent == 2:
                # Sooner the worker would take it for the first one once more.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(max(0.0, self._first_sent + SECOND_REQUEST_SECONDS - time.monotonic()))
            self._process.send_signal(signal.SIGINT if self.num_sent < 3 else signal.SIGKILL)
            # The queue may be put into from a handler; the terminal may not be written to from one.
            how = "at the next safe point (Ctrl-C again to stop at once)" if self.num_sent == 1 else "at once"
            self._events.put(Event("notice", "story", f"stopping {how}"))


def _read(process: subprocess.Popen[str], events: queue.SimpleQueue[Event | None]) -> tuple[collections.deque[str], threading.Thread]:
    """Fill `events` from the worker's standard output, ended by None; returns the last lines of its standard error as they come."""
    lines: collections.deque[str] = collections.deque(maxlen=STDERR_LINES)

    def read_errors() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line.rstrip())

    def read_events() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if event := _parse(line):
                events.put(event)
        events.put(None)

    reader = threading.Thread(target=read_errors, daemon=True)
    for thread in (reader, threading.Thread(target=read_events, daemon=True)):
        thread.start()
    return lines, reader


def _parse(line: str) -> Event | None:
    try:
        return Event(**json.loads(line))
    except (json.JSONDecodeError, TypeError):
        return None


def _unexpected(returncode: int, last_words: Sequence[str]) -> GiongError:
    if returncode == -signal.SIGKILL:
        return ResourceError(
            "The worker was killed by the system, most likely for memory",
            remedy="Lower train.max_tokens_per_pack: the same command then goes on from the last checkpoint. Where the weights alone are too much, "
            "set model.dtype to bfloat16 or take a smaller model.",
        )
    if returncode in (-signal.SIGTERM, -signal.SIGINT):
        return Interrupted("The worker was stopped", remedy="Run the same command again to go on.")
    trace = "\n".join(last_words)
    error = GiongError(
        f"The worker ended unexpectedly (exit code {returncode}): {last_words[-1] if last_words else 'it left no message'}",
        remedy="Run again with --debug for its last lines; finished work is on disk.",
    )
    error.add_note(trace)
    return error
