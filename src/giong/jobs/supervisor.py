"""Start a worker process, follow its events, and turn its end into a result or an error.

The worker gets allocator settings that keep freed memory: glibc would otherwise give every large tensor back to the
system and fault it in again, page by page, at the next step (see docs/decisions/0002-allocator.md).
"""

from __future__ import annotations

import collections
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from giong import errors
from giong.contracts import Emit, Event
from giong.errors import GiongError, Interrupted, ResourceError

ALLOCATOR = {
    # 32 MiB is the largest threshold glibc accepts; a larger value is ignored, and setting only the other two would
    # freeze the threshold at 128 KiB, which is the slowest of all.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 1024 * 1024),
    "MALLOC_TRIM_THRESHOLD_": str(16 * 1024**3),
    "MALLOC_TOP_PAD_": str(64 * 1024 * 1024),
}
STDERR_LINES = 40


def worker_environment() -> dict[str, str]:
    """This process's environment with the allocator's settings; what the user set stays."""
    quiet = {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return {**ALLOCATOR, **quiet, **os.environ}


def worker_command(command: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "giong.worker", command, *options]


def run_story(project: Path, steps: Sequence[str], emit: Emit, *, force: bool = False) -> None:
    """Run steps in a worker and pass its events on. Raises the worker's GiongError; Ctrl-C waits for its checkpoint."""
    options = ["--project", str(project), "--steps", ",".join(steps), *(["--force"] if force else [])]
    process = subprocess.Popen(
        worker_command("story", *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
        errors="replace", env=worker_environment(), start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    last_words = _follow_stderr(process)
    error: GiongError | None = None
    interrupts = 0
    while True:
        try:
            for line in process.stdout:
                event = _parse(line)
                if event and event.kind == "error":
                    error = errors.from_dict(event.data)
                elif event:
                    emit(event)
            process.wait()
            break
        except KeyboardInterrupt:
            # The worker has a session of its own, so the terminal's Ctrl-C reaches only us: pass it on, once or twice.
            interrupts += 1
            process.send_signal(signal.SIGINT if interrupts < 3 else signal.SIGKILL)
            emit(Event("notice", "story", "stopping at the next safe point (Ctrl-C again to stop at once)"))
    if error:
        raise error
    if process.returncode:
        raise _unexpected(process.returncode, last_words)


def _follow_stderr(process: subprocess.Popen[str]) -> collections.deque[str]:
    lines: collections.deque[str] = collections.deque(maxlen=STDERR_LINES)

    def follow() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line.rstrip())

    threading.Thread(target=follow, daemon=True).start()
    return lines


def _parse(line: str) -> Event | None:
    try:
        return Event(**json.loads(line))
    except (json.JSONDecodeError, TypeError):
        return None


def _unexpected(returncode: int, last_words: Sequence[str]) -> GiongError:
    if returncode == -signal.SIGKILL:
        return ResourceError(
            "The worker was killed by the system, most likely for memory",
            remedy="Lower train.max_tokens_per_pack or take a smaller model; the same command goes on from the last checkpoint.",
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
