"""What a run will take here: by the speed of finished runs of the same recipe, and by the probe's where there is none yet."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from giong.config import MethodConfig, TrainConfig
from giong.engine.distributed import ALONE
from giong.models.devices import machine_of, resolve_device
from giong.models.rows import RowReport
from giong.sizing.defaults import ResolvedTraining
from giong.sizing.estimate import Estimate, PlannedRun, estimate_training
from giong.sizing.hardware import Machine
from giong.sizing.shapes import num_trainable_parameters
from giong.workflow.probing import probe
from giong.workflow.story import Story
from giong.workspace import read_json

if TYPE_CHECKING:
    from giong.workflow.training import Run


def resolved_of(run: Run) -> ResolvedTraining:
    settings = run.record["settings"]
    return ResolvedTraining(MethodConfig(**settings["method"]), TrainConfig(**settings["train"]), run.record["reasons"])


def estimate_run(story: Story, run: Run, report: RowReport, *, num_replayed_tokens: int = 0) -> Estimate:
    """Time, memory and cost of a run here."""
    planned = planned_run(story, run, report, num_replayed_tokens=num_replayed_tokens)
    return estimate_training(planned, machine=machine_here(story), usd_per_hour=story.config.budget.usd_per_hour)


def machine_here(story: Story) -> Machine:
    """This machine as one of its processes has it, with the GPU that `model.device` stands for. Raises ConfigError where that is not there."""
    machine = machine_of(resolve_device(story.config.model.device))
    if machine.available_memory_bytes is None:
        return machine
    # Each has a GPU of its own, and they share the memory of the machine.
    return replace(machine, available_memory_bytes=machine.available_memory_bytes // (story.processes or ALONE).num_on_machine)


def planned_run(story: Story, run: Run, report: RowReport, *, num_replayed_tokens: int = 0) -> PlannedRun:
    """A run as `sizing.estimate` wants to be told of it."""
    resolved, measured, shape = resolved_of(run), probe(story), story.local.loaded.shape
    train, num_epochs, num_processes = resolved.train, resolved.train.num_epochs or 1.0, (story.processes or ALONE).size
    return PlannedRun(
        shape, resolved.method, num_trainable_parameters(shape, resolved.method),
        num_tokens=round((report.num_tokens + num_replayed_tokens) * num_epochs), max_tokens_per_pack=train.max_tokens_per_pack,
        dtype=measured["dtype"], probe_tokens_per_second=measured["train_tokens_per_second"],
        run_tokens_per_second=finished_speed(story, run), row_tokens=max(report.num_tokens // max(report.num_rows, 1), 1),
        max_row_tokens=report.max_row_tokens or None, optimizer=train.optimizer,
        # Of the day: no result depends on it, and the run's record does not have it.
        activation_checkpointing=story.config.train.activation_checkpointing,
        loss_share=report.num_loss_tokens / max(report.num_tokens, 1),
        num_steps=math.ceil(report.num_rows * num_epochs / train.batch_rows),
        num_processes=num_processes, num_shards=num_shards(story, resolved),
    )  # fmt: skip


def num_shards(story: Story, resolved: ResolvedTraining) -> int:
    """Over how many processes a run will spread weights, gradients and optimizer state; 1 where each holds all that moves.

    It is `engine.sharding.shard` that does it, where all weights of the model are trained: those of method `full`.
    """
    return (story.processes or ALONE).size if resolved.method.name == "full" and resolved.train.fsdp else 1


def finished_speed(story: Story, run: Run) -> float | None:
    """Tokens a second, of all processes together, of this project's finished runs with the same recipe and as many processes on the same
    machine; None where there is none."""
    num_tokens = seconds = 0.0
    for folder in story.project.list_runs():
        if (folder / "results.json").is_file() and _recipe(record := read_json(folder / "run.json")) == _recipe(run.record):
            results = read_json(folder / "results.json")
            same_place = record["machine"] == run.record["machine"] and results["num_processes"] == (story.processes or ALONE).size
            # A run that was killed after its last step came back to nothing to do.
            if same_place and results["num_tokens"]:
                num_tokens += results["num_tokens"]
                seconds += results["num_tokens"] / results["tokens_per_second"]
    return num_tokens / seconds if num_tokens else None


def _recipe(record: dict[str, Any]) -> list[Any]:
    """What the speed of a run depends on."""
    settings = record["settings"]
    train = {name: settings["train"].get(name) for name in ("batch_rows", "max_tokens_per_pack", "kl_weight", "fsdp", "optimizer")}
    return [record["model_identity"], settings["method"], settings.get("objective"), settings["dtype"], train]
