"""The only door between the two sides: a process that works on a project, or serves its models.

    python -m giong.worker story --project DIR --steps import,synth,...    events as JSON lines on standard output
    python -m giong.worker serve --project DIR --socket ADDRESS            a model process for the server
    torchrun --nproc-per-node N -m giong.worker story ...                  the same by N processes, which share each training run

A request to stop (SIGTERM, Ctrl-C) is answered at the next safe point, with a checkpoint; a second one, some seconds later, ends at once.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from giong.contracts import SAME_REQUEST_SECONDS, Event
from giong.errors import GiongError, Interrupted, ResourceError
from giong.models.hub_kernels import keep_off_hubs

if TYPE_CHECKING:
    from giong.engine.distributed import Processes


def is_launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


class Stop:
    """Set by SIGTERM or SIGINT; a signal that comes more than `SAME_REQUEST_SECONDS` later raises KeyboardInterrupt wherever the work is.

    So does the end of a launcher that would have passed signals on: the work would go on with nobody to stop it.
    """

    def __init__(self) -> None:
        self._asked_at: float | None = None
        self._launcher = os.getppid() if is_launched() else None

    def __call__(self) -> bool:
        if self._launcher and os.getppid() != self._launcher:
            raise KeyboardInterrupt
        return self._asked_at is not None

    def ask(self) -> None:
        """From now on the work is to stop."""
        if self._asked_at is None:
            self._asked_at = time.monotonic()

    def install(self) -> None:
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        if self._asked_at is not None and time.monotonic() - self._asked_at > SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt
        self.ask()


class EventStream:
    """Writes events to standard output, one JSON object a line; when nobody reads any more, asks the work to stop."""

    def __init__(self, stop: Stop) -> None:
        # Libraries print: what they print goes to stderr, and only events to the real standard output.
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        os.dup2(2, 1)
        self._lock = threading.Lock()
        self._stop = stop

    def __call__(self, event: Event) -> None:
        from giong.workspace import plain

        try:
            with self._lock:
                self._out.write(json.dumps(event.to_dict(), ensure_ascii=False, default=plain) + "\n")
        except BrokenPipeError:
            self._stop.ask()


def run_story(arguments: argparse.Namespace) -> int:
    """Perform steps of a project; the exit code is the error's."""
    stop = Stop()
    stop.install()
    emit = EventStream(stop)
    processes = None
    try:
        if is_launched():
            # Before anything heavy is loaded: who waits for a process that never comes should know soon.
            from giong.engine.distributed import connect

            processes = connect()
            if not processes.is_first:
                return _follow(processes, stop)
        from giong.config import load, with_settings
        from giong.workflow import Story, perform
        from giong.workspace import Project

        project = Project(arguments.project)
        settings = json.loads(arguments.settings)
        if processes:
            # Whoever calls torchrun himself is told as well what cannot be shared by several processes.
            settings["train.num_processes"] = processes.size
        config = with_settings(load(project.config_path), settings)
        story = Story(project, config, emit=emit, should_stop=stop, force=arguments.force, processes=processes)
        with story.project.claimed():
            perform(story, arguments.steps.split(","))
        emit(Event("result", "story"))
        return 0
    except GiongError as error:
        # Of several processes one speaks: the first of those that are left.
        return _report(emit, error) if processes is None or processes.is_spokesman else error.exit_code
    except KeyboardInterrupt:
        _report(emit, Interrupted("Stopped at once", remedy="Run the same command again: it goes on from the last checkpoint."))
        # At once: the interpreter would first wait for threads that wait for a remote model. All that is written is synced.
        os._exit(Interrupted.exit_code)
    except OSError as error:
        from giong.workspace import refusal

        traceback.print_exc()
        return _report(emit, refusal(error, str(error.filename or arguments.project)))
    except MemoryError:
        return _report(emit, ResourceError("Out of memory", remedy="Lower train.max_tokens_per_pack, or take a smaller model."))
    finally:
        if processes and processes.is_first:
            processes.order(None)


def _follow(processes: Processes, stop: Stop) -> int:
    from giong.workflow.joining import follow

    follow(processes, stop)
    return 0


def _report(emit: EventStream, error: GiongError) -> int:
    emit(Event("error", "story", str(error), error.to_dict()))
    return error.exit_code


def run_server(arguments: argparse.Namespace) -> int:
    from giong.engine.step import evaluate_rows
    from giong.serving.process import serve

    stop = Stop()
    emit = EventStream(stop)
    try:
        serve(arguments.project, arguments.socket, emit, evaluate_rows)
        return 0
    except GiongError as error:
        return _report(emit, error)


def main(argv: Sequence[str] | None = None) -> int:
    keep_off_hubs()
    parser = argparse.ArgumentParser(prog="giong.worker", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    story = commands.add_parser("story")
    story.add_argument("--project", type=Path, required=True)
    story.add_argument("--steps", required=True)
    story.add_argument("--force", action="store_true")
    story.add_argument("--settings", default="{}", help="settings of this walk alone, as a JSON object by dotted name")
    story.set_defaults(run=run_story)
    serve = commands.add_parser("serve")
    serve.add_argument("--project", type=Path, required=True)
    serve.add_argument("--socket", required=True)
    serve.set_defaults(run=run_server)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
