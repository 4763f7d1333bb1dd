"""The command line as a user meets it: `python -m giong` in a process, its exit code and what it said, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from giong import errors


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    told: str

    def refused(self, error: type[errors.GiongError], *parts: str) -> str:
        """Check that it ended in one sentence of this kind that holds all `parts`; returns the sentence."""
        assert self.code == error.exit_code, self.told
        assert "Traceback" not in self.told
        sentences = [line for line in self.told.splitlines() if line.startswith("giong: ")]
        assert len(sentences) == 1, self.told
        assert self.told.rstrip().endswith(sentences[0])
        assert [part for part in parts if part not in sentences[0]] == [], sentences[0]
        return sentences[0]

    def worked(self) -> Done:
        assert self.code == 0, self.told
        assert "giong: " not in self.told
        return self


def environment(**more: str) -> dict[str, str]:
    # A key of the machine's own would be sent to no one, but a test must not depend on there being one.
    return {**{key: value for key, value in os.environ.items() if key != "OPENAI_API_KEY"}, "PYTHONUNBUFFERED": "1", **more}


def giong(*arguments: str | Path, cwd: Path | None = None, given: str = "", prepare: Callable[[], None] | None = None) -> Done:
    """Run a command to its end; `prepare` runs in its process before it starts."""
    done = subprocess.run(
        [sys.executable, "-m", "giong", *map(str, arguments)], capture_output=True, text=True, cwd=cwd, input=given, env=environment(),
        timeout=120, check=False, preexec_fn=prepare,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


class Running:
    """A command under way in a process group of its own, as a terminal starts it."""

    def __init__(self, *arguments: str | Path, options: tuple[str, ...] = ()) -> None:
        command = [sys.executable, *options, "-m", "giong", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), process_group=0
        )
        self.told: list[str] = []

    def until(self, text: str) -> Running:
        """Wait for a line on standard error that holds `text`."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.told.append(line)
            if text in line:
                return self
        pytest.fail(f"{text!r} was not said: {''.join(self.told)}")

    def interrupted(self) -> Done:
        """Press Ctrl-C and wait for the end."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self._ended()

    def terminated(self) -> Done:
        """Send SIGTERM to the command alone, as a scheduler does, and wait for the end."""
        self.process.terminate()
        return self._ended()

    def _ended(self) -> Done:
        try:
            out, told = self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return Done(self.process.returncode, out, "".join(self.told) + told)


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
