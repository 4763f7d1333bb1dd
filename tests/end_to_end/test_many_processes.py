"""`giong train --num-processes 2` from start to end: stopped as a service manager does, one process killed, and finished, each time by torchrun."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import small_writing
import torch
from safetensors import safe_open

from giong.config import ModelConfig
from giong.contracts import Event
from giong.engine.checkpoint import list_checkpoints
from giong.engine.score import mean_row_loss
from giong.errors import ConfigError, Interrupted, ResourceError
from giong.jobs.supervisor import run_story, worker_command, worker_environment
from giong.models.load import load_model
from giong.models.rows import example_rows
from giong.project import init
from giong.workflow.story import Story
from giong.workspace import Project, read_json, read_jsonl

NUM_STEPS = 18


def test_one_process_is_started_plainly_and_several_by_torchrun(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert worker_command("story", "--force")[1:] == ["-m", "giong.worker", "story", "--force"]
    launched = worker_command("story", "--force", num_processes=3)
    assert launched[1:] == [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "3",
        "-m",
        "giong.worker",
        "story",
        "--force",
    ]
    assert "OMP_NUM_THREADS" not in worker_environment()
    assert worker_environment(3)["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": {"name": "ppo"}, "data": {"preferences": "pairs.jsonl"}}, "objective.name ppo trains in one process"),
        ({"objective": {"name": "distill", "teacher": "teacher"}}, "objective.name distill trains in one process"),
        ({"objective": {"name": "kto"}, "data": {"preferences": "pairs.jsonl"}}, "leave it out with objective.name kto"),
        ({"task": "classify"}, "train.num_processes is made for task generate alone"),
    ],
)
def test_what_one_process_has_to_do_is_not_begun_by_two(
    settings: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The option is refused as the setting is: these would hang, train something else, or leave the second process idle."""
    project = init(tmp_path / "voice", sources=[small_writing.write_author(tmp_path / "writing")], settings=settings)
    monkeypatch.setattr("giong.jobs.supervisor.subprocess.Popen", None)
    with pytest.raises(ConfigError, match=message):
        run_story(project.root, ["train"], [].append, num_processes=2)


@pytest.fixture(scope="module")
def project(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("many")
    settings = {
        **small_writing.SETTINGS,
        "model": {"name_or_path": str(tiny_folder("qwen2", max_position_embeddings=1024)), "dtype": "float32"},
        "method": {"name": "full"},
        "sampling": {"temperature": 0.5, "top_p": 0.9},
        "train": {"num_epochs": 2, "batch_rows": 4, "eval_steps": 2, "load_best_model_at_end": True, "num_processes": 2},
    }
    made = init(folder / "voice", sources=[small_writing.write_author(folder / "writing")], settings=settings)
    run_story(made.root, ["import", "synth"], lambda event: None)
    return made


class Listener:
    """Collects events; calls `act` when that many steps are done."""

    def __init__(self, at_step: int = -1, act: Callable[[], None] = lambda: None) -> None:
        self.events: list[Event] = []
        self.at_step, self.act = at_step, act

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if event.kind == "step" and event.data["step"] == self.at_step:
            self.act()

    def steps(self) -> list[int]:
        return [event.data["step"] for event in self.events if event.kind == "step"]


def started_for(project: Project) -> Iterator[tuple[int, list[bytes]]]:
    """(pid, environment) of torchrun and the workers of this project, found by what they were started with."""
    for entry in Path("/proc").iterdir():
        try:
            arguments, environment = ((entry / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except (OSError, ValueError):
            continue
        if str(project.root).encode() in arguments:
            yield int(entry.name), environment


def kill_rank(project: Project, rank: int) -> None:
    """SIGKILL to a worker of this project."""
    for pid, environment in started_for(project):
        if f"RANK={rank}".encode() in environment:
            os.kill(pid, signal.SIGKILL)
            return
    pytest.fail(f"no worker of rank {rank}")


def stop_all(project: Project) -> None:
    """A signal to every process of the job, as a service manager sends it: the workers get it from three sides."""
    pids = [pid for pid, _ in started_for(project)]
    assert len(pids) >= 3
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds a worker through /proc")
def test_stopped_killed_and_finished(project: Project):
    """Each start goes on from the last checkpoint; only the first process speaks, and the model that it saves is whole."""
    stopped = Listener(3, lambda: stop_all(project))
    with pytest.raises(Interrupted, match="Stopped by request"):
        run_story(project.root, ["train"], stopped)
    run = next((project.root / "runs").iterdir())
    done = int(list_checkpoints(run / "checkpoints")[-1].name[5:])
    assert stopped.steps() == list(range(1, done + 1))
    assert 3 <= done < NUM_STEPS

    killed = Listener(done + 3, lambda: kill_rank(project, 1))
    began = time.monotonic()
    with pytest.raises(ResourceError, match=r"Process 1 of 2 \(.*\) is gone, so the run stops at its last checkpoint"):
        run_story(project.root, ["train"], killed)
    assert time.monotonic() - began < 120
    assert killed.steps()[0] == done + 1
    kept = int(list_checkpoints(run / "checkpoints")[-1].name[5:])
    assert kept >= done

    finished = Listener()
    run_story(project.root, ["train"], finished)
    assert finished.steps() == list(range(kept + 1, NUM_STEPS + 1))
    results = read_json(run / "results.json")
    assert results["num_processes"] == 2
    # What was measured while both held a part of the weights is what one process measures on what was saved.
    losses = [event["data"]["validation_loss"] for event in read_jsonl(run / "events.jsonl") if "validation_loss" in event["data"]]
    assert results["validation_loss"] == min(losses)
    validation = [example for example in Story(project).examples if example.side == "calibration"]
    loaded = load_model(ModelConfig(name_or_path=str(run / "weights")), dtype=torch.float32)
    saved = mean_row_loss(loaded.model, example_rows(loaded, validation)[0], 2048)
    assert saved == pytest.approx(results["validation_loss"], abs=1e-4)
    assert results["num_trainable"] == 90_688
    with safe_open(run / "weights" / "model.safetensors", "pt") as weights:
        assert weights.get_slice("model.embed_tokens.weight").get_shape() == [448, 64]
    assert (project.model_path("voice") / "model.json").is_file()
