"""Runs a worker on a project, kills it at drawn times, says where each kill landed, and compares what came of it.

A time is drawn on the clock of an uninterrupted run and hit in another process by its last event before that time: wait
for that event, sleep the rest, kill. A wall clock alone would miss, because the machine is never twice equally fast.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from giong.jobs.supervisor import worker_command, worker_environment
from giong.workspace import PARTIAL, Project, mend_torn_end, read_json, read_jsonl

STEPS = "import,synth,baseline,size,train,eval,report"
INSIDE = ("step", "checkpoint")
"""Where half of the kills have to land: in the computation of a training step, or in the writing of a checkpoint."""
END_SECONDS = 600.0
"""A worker that takes longer hangs, and is killed."""


@dataclass(frozen=True)
class Moment:
    """An event of a worker, `seconds` after its process was started. `step` is that of a training event."""

    seconds: float
    kind: str
    stage: str
    step: int | None
    num_steps: int | None


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: the window it was meant for, the window it hit, and what it left half-written."""

    aimed_at: str
    landed_in: str
    stage: str
    after: str
    seconds: float
    left: list[str]


@dataclass(frozen=True)
class Target:
    """A time on the reference's clock: `offset` seconds after `anchor` (the start of the process for None)."""

    seconds: float
    anchor: Moment | None
    offset: float
    window: str


class Worker:
    """A worker process in a group of its own, and the moments of its event stream."""

    def __init__(self, project: Path, steps: str) -> None:
        self.started = time.time()
        self.last_words = project.with_name(f"{project.name}.stderr")
        with self.last_words.open("ab") as stderr:
            self.process = subprocess.Popen(
                worker_command("story", "--project", str(project), "--steps", steps),
                stdout=subprocess.PIPE, stderr=stderr, env=worker_environment(), start_new_session=True,
            )  # fmt: skip
        self.moments: list[Moment] = []
        self._watchdog = threading.Timer(END_SECONDS, self.kill)
        self._watchdog.daemon = True
        self._watchdog.start()

    def follow(self) -> Iterator[Moment]:
        """Every event but progress, as it comes; ends with the stream."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if not line.endswith(b"\n"):
                return
            event = json.loads(line)
            assert event["kind"] != "error", event
            if event["kind"] != "progress":
                data = event["data"]
                moment = Moment(event["time"] - self.started, event["kind"], event["stage"], data.get("step"), data.get("num_steps"))
                self.moments.append(moment)
                yield moment

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> int:
        """Read on to the end; the exit code."""
        for _ in self.follow():
            pass
        assert self.process.stdout is not None
        self.process.stdout.close()
        exit_code = self.process.wait()
        self._watchdog.cancel()
        return exit_code


def run_to_end(project: Path, steps: str = STEPS) -> list[Moment]:
    """The moments of a run that nobody disturbs."""
    worker = Worker(project, steps)
    assert worker.end() == 0, worker.last_words.read_text()[-2000:]
    return worker.moments


@dataclass
class Timeline:
    """The clock of an uninterrupted run, cut into windows by its events."""

    moments: list[Moment]
    save_steps: int
    stages: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.stages = list(dict.fromkeys(moment.stage for moment in self.moments if moment.kind == "stage_started"))

    @property
    def seconds(self) -> float:
        return self.moments[-1].seconds

    def progress(self, moment: Moment) -> tuple[int, float, int] | None:
        """How far a run is at an event, comparable between runs; None for events that say nothing about it."""
        if moment.stage not in self.stages or moment.kind == "notice":
            return None
        number = self.stages.index(moment.stage)
        if moment.kind in INSIDE and moment.step is not None:
            return number, moment.step, INSIDE.index(moment.kind)
        return number, -1.0 if moment.kind == "stage_started" else math.inf, 0

    def num_steps(self, stage: str) -> int:
        return max(moment.step or 0 for moment in self.moments if moment.stage == stage)

    def window_after(self, moment: Moment | None) -> str:
        """What a run does after this event and before its next: a training "step", a "checkpoint" write or something "else"."""
        if moment is None or moment.step is None:
            return "else"
        is_last = moment.step == self.num_steps(moment.stage)
        if moment.kind == "step":
            return "checkpoint" if is_last or moment.step % self.save_steps == 0 else "step"
        return "else" if is_last else "step"

    def target(self, seconds: float) -> Target:
        before = [moment for moment in self.moments if moment.seconds <= seconds and self.progress(moment)]
        anchor = before[-1] if before else None
        return Target(seconds, anchor, seconds - (anchor.seconds if anchor else 0.0), self.window_after(anchor))

    def draw(self, num: int, num_aimed: int, generator: random.Random) -> list[Target]:
        """Uniform times over the run in their order, `num_aimed` of them drawn again until they lie in a step or a checkpoint."""
        targets = []
        for number in range(num):
            target = self.target(generator.uniform(0, self.seconds))
            while number < num_aimed and target.window not in INSIDE:
                target = self.target(generator.uniform(0, self.seconds))
            targets.append(target)
        return sorted(targets, key=lambda target: target.seconds)


def run_and_kill(project: Path, timeline: Timeline, target: Target, steps: str = STEPS) -> Kill | None:
    """Run again and kill at the target; None when the run was over before that."""
    worker = Worker(project, steps)
    wanted = timeline.progress(target.anchor) if target.anchor else None
    if wanted:
        # An event that a resumed run no longer has is taken to have come with the first one behind it.
        for moment in worker.follow():
            reached = timeline.progress(moment)
            if reached and reached >= wanted:
                break
    time.sleep(target.offset)
    worker.kill()
    seconds = time.time() - worker.started
    if worker.end() == 0:
        return None
    known = [moment for moment in worker.moments if timeline.progress(moment) or moment.step is not None]
    last = known[-1] if known else None
    left = sorted(path.name for path in project.rglob(f".*{PARTIAL}"))
    return Kill(
        target.window, "else" if _is_recording(project, worker, last) else timeline.window_after(last),
        last.stage if last else "start", f"{last.kind} {last.step or ''}".strip() if last else "", round(seconds, 3), left,
    )  # fmt: skip


def _is_recording(project: Path, worker: Worker, last: Moment | None) -> bool:
    """Whether the kill came while an event was written down: neither a training step nor a checkpoint."""
    files = sorted(project.glob("runs/*/events.jsonl"), key=lambda path: path.stat().st_mtime)
    content = files[-1].read_bytes() if files else b""
    if not content or last is None:
        return False
    return not content.endswith(b"\n") or json.loads(content.splitlines()[-1])["time"] - worker.started > last.seconds


def kill_again_and_again(
    new_project: Callable[[], Path], timeline: Timeline, num: int, generator: random.Random, steps: str = STEPS
) -> tuple[list[Path], list[Kill]]:
    """At least `num` kills, at least half of them inside; then the same command to the end. Also returns the projects.

    A kill that would come after the end is drawn again, on a new copy of the project: nothing is left to do in the old one.
    """
    projects: list[Path] = []
    kills: list[Kill] = []
    for _ in range(5):
        num_inside = sum(kill.landed_in in INSIDE for kill in kills)
        num_missing = max(num - len(kills), math.ceil(max(num, len(kills)) / 2) - num_inside)
        if num_missing <= 0:
            break
        projects.append(new_project())
        for target in timeline.draw(num_missing, min(num_missing, math.ceil(num / 2) - num_inside), generator):
            kill = run_and_kill(projects[-1], timeline, target, steps)
            if kill is None:
                break
            print(asdict(kill))
            kills.append(kill)
        run_to_end(projects[-1], steps)
    return projects, kills


def copy_project(project: Path, to: Path) -> Path:
    shutil.copytree(project, to)
    return to


def without_times(value: Any) -> Any:
    """The value without what a clock says, at any depth."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in ("seconds", "created")}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def differences(reference: Path, project: Path) -> list[str]:
    """What of a killed and finished project is not as in the uninterrupted one, and what the kills left lying about."""
    found = [f"{name} differs" for name in _same_bytes(reference) if not _equal_files(reference / name, project / name)]
    found += [f"{path} is left over" for path in project.rglob(".*")]
    for name in [path.relative_to(reference) for path in reference.glob("arms/*.jsonl")]:
        if without_times(read_jsonl(reference / name)) != without_times(read_jsonl(project / name)):
            found.append(f"the replies in {name} differ")
    for name in [Path("evaluation.json"), *(path.relative_to(reference) for path in reference.glob("models/*/model.json"))]:
        if (reference / name).is_file() and without_times(read_json(reference / name)) != without_times(read_json(project / name)):
            found.append(f"{name} differs in more than its times")
    for runs in (reference, project):
        if Project(runs).list_runs() != sorted((runs / "runs").glob("*")):
            found.append(f"{runs} has a run without a record")
    for run in Project(reference).list_runs():
        found += _run_differences(run, project / "runs" / run.name)
    return found


def _same_bytes(reference: Path) -> Iterable[Path]:
    yield from (Path("data") / name for name in ("documents.jsonl", "passages.jsonl", "split.json", "examples.jsonl"))
    for pattern in ("runs/*/*/*.safetensors", "models/*/*/*.safetensors"):
        yield from (path.relative_to(reference) for path in reference.glob(pattern))


def _equal_files(first: Path, second: Path) -> bool:
    return first.is_file() == second.is_file() and (not first.is_file() or first.read_bytes() == second.read_bytes())


def _run_differences(reference: Path, run: Path) -> list[str]:
    found = []
    names, expected = ([path.name for path in sorted((folder / "checkpoints").iterdir())] for folder in (run, reference))
    if names != expected:
        found.append(f"{run.name} has the checkpoints {names} and not {expected}")
    for checkpoint in (run / "checkpoints").iterdir():
        with safe_open(checkpoint / "state.safetensors", framework="numpy") as tensors:
            assert list(tensors.keys()), checkpoint
        if not _equal_files(checkpoint / "state.safetensors", reference / "checkpoints" / checkpoint.name / "state.safetensors"):
            found.append(f"{run.name}/{checkpoint.name} differs")
    losses = {row["data"]["step"]: row["data"]["loss"] for row in _steps(reference)}
    done = {row["data"]["step"] for row in _steps(run)}
    if done != set(losses):
        found.append(f"{run.name} recorded the steps {sorted(done)}")
    # A step that was done twice must have come out the same both times.
    found += [
        f"{run.name}: step {r['data']['step']} had another loss" for r in _steps(run) if r["data"]["loss"] != losses[r["data"]["step"]]
    ]
    return found


def _steps(run: Path) -> Sequence[dict[str, Any]]:
    mend_torn_end(run / "events.jsonl")
    return [row for row in read_jsonl(run / "events.jsonl") if row["kind"] == "step"]
