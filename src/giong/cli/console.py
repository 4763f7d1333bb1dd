"""What a person sees while a worker works: bars and sentences on standard error; data alone goes to standard output.

On a terminal every long step has a bar; in a log file the same events are plain lines, a few per step.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from giong.contracts import Emit, Event

LOG_SECONDS = 10.0


@contextmanager
def event_display() -> Iterator[Emit]:
    """An `Emit` that shows events: live bars on a terminal, lines elsewhere."""
    if sys.stderr.isatty():
        with _bars() as emit:
            yield emit
    else:
        yield _lines()


@contextmanager
def _bars() -> Iterator[Emit]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"), TimeElapsedColumn(), TimeRemainingColumn(compact=True),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, int] = {}

        def emit(event: Event) -> None:
            if event.kind == "stage_started":
                tasks[event.stage] = progress.add_task(event.stage, total=None, detail="")
                if event.message:
                    console.print(f"[bold]{event.stage}[/bold]  {event.message}", highlight=False)
            elif event.kind in ("progress", "step"):
                task = tasks.get(event.stage)
                if task is not None:
                    progress.update(task, **_position(event))
            elif event.kind == "stage_finished":
                task = tasks.get(event.stage)
                if task is not None:
                    total = progress.tasks[progress.task_ids.index(task)].total or 1
                    progress.update(task, total=total, completed=total)
            elif line := describe(event):
                console.print(line, highlight=False, markup=False)

        yield emit


def _position(event: Event) -> dict[str, object]:
    data = event.data
    if event.kind == "step":
        return {
            "completed": data["step"],
            "total": data["num_steps"],
            "detail": f"loss {data['loss']:.3f}  {data['tokens_per_second']:.0f} tokens/s",
        }
    return {"completed": data["done"], "total": data["total"], "detail": ""}


def describe(event: Event) -> str:
    """One line for an event that is worth a line; empty for the others."""
    if event.kind == "notice":
        return f"  {event.message}"
    if event.kind == "stage_skipped":
        return f"  {event.stage}: {event.message}"
    return ""


def _lines() -> Emit:
    last: dict[str, float] = {}
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731

    def emit(event: Event) -> None:
        if event.kind == "stage_started":
            say(f"{event.stage}  {event.message}")
            last[event.stage] = time.monotonic()
        elif event.kind == "stage_finished":
            say(f"  {event.stage}: done in {event.data['seconds']:.1f} s")
        elif event.kind in ("progress", "step"):
            if time.monotonic() - last.get(event.stage, 0.0) > LOG_SECONDS:
                last[event.stage] = time.monotonic()
                position = _position(event)
                say(f"  {event.stage}: {position['completed']}/{position['total']} {position['detail']}".rstrip())
        elif line := describe(event):
            say(line)

    return emit
