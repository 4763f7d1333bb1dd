"""What a run will take here: by the speed of finished runs of the same recipe, and by the probe's where there is none yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from giong.config import MethodConfig, TrainConfig
from giong.config.training import OF_THE_DAY, ONLINE
from giong.engine.distributed import ALONE
from giong.engine.heap import trim
from giong.models.devices import machine_of, resident_bytes, resolve_device
from giong.models.rows import Row
from giong.sizing.defaults import ResolvedTraining
from giong.sizing.estimate import Estimate, PlannedRun, estimate_training
from giong.sizing.hardware import Machine
from giong.sizing.memory import RUNTIME_BYTES, dtype_bytes
from giong.sizing.moving import SOFT_PROMPTS
from giong.sizing.shapes import num_trainable_parameters
from giong.sizing.units import format_bytes, format_cost, format_seconds
from giong.workflow.drawing import answer_limit
from giong.workflow.probing import probe
from giong.workflow.story import Story
from giong.workflow.workload import choosing_tokens, drawn_lengths, lanes_of, largest_pack_of, lengths_of, num_anchors, workload_of
from giong.workspace import read_json

if TYPE_CHECKING:
    from giong.workflow.training import Run


def resolved_of(story: Story, run: Run) -> ResolvedTraining:
    """What the run is made with: the settings of its record, and those that are the day's."""
    settings = run.record["settings"]
    of_the_day = {name: getattr(story.config.train, name) for name in OF_THE_DAY}
    return ResolvedTraining(MethodConfig(**settings["method"]), TrainConfig(**{**settings["train"], **of_the_day}), run.record["reasons"])


def estimate_run(story: Story, run: Run, rows: Sequence[Row]) -> Estimate:
    """Time, memory and cost of a run here; `rows` are all that it is trained on."""
    return estimate_training(planned_run(story, run, rows), machine=machine_here(story), usd_per_hour=story.config.budget.usd_per_hour)


def announce_run(story: Story, run: Run, resolved: ResolvedTraining, rows: Sequence[Row], stage_name: str) -> Estimate:
    """Say what the run will take, and why its settings are what they are."""
    for reason in resolved.reasons.values():
        story.notice(stage_name, reason)
    if resolved.method.name in SOFT_PROMPTS:
        story.notice(stage_name, "a soft prompt cannot be merged into the weights: it is exported as an adapter alone")
    if story.config.objective.is_online:
        story.notice(stage_name, _assumed_of_draws(story, run, rows))
    estimate = estimate_run(story, run, rows)
    num_trainable = num_trainable_parameters(story.local.loaded.shape, resolved.method)
    num_processes = (story.processes or ALONE).size
    share = f" in each of {num_processes} processes" if num_processes > 1 else ""
    if num_again := estimate.num_checkpointed_layers:
        share += f" with {num_again} of {story.local.loaded.shape.num_hidden_layers} layers computed again"
    if estimate.is_offloaded:
        share += f"{' and' if num_again else ' with'} activations in the host's memory"
    drawing = f" ({format_seconds(estimate.write_seconds)} of it to draw answers)" if estimate.write_seconds else ""
    story.notice(
        stage_name,
        f"about {format_seconds(estimate.seconds)}{drawing}, {format_bytes(estimate.peak_memory_bytes)}{share}, {format_cost(estimate.usd)} ({num_trainable:,} trainable parameters)",
    )
    return estimate


def machine_here(story: Story) -> Machine:
    """This machine as one of its processes has it, with the GPU that `model.device` stands for. Raises ConfigError where that is not there."""
    machine = machine_of(resolve_device(story.config.model.device))
    if machine.available_memory_bytes is None:
        return machine
    # Each has a GPU of its own, and they share the memory of the machine.
    return replace(machine, available_memory_bytes=machine.available_memory_bytes // (story.processes or ALONE).num_on_machine)


def planned_run(story: Story, run: Run, rows: Sequence[Row]) -> PlannedRun:
    """A run as `sizing.estimate` wants to be told of it."""
    resolved, measured, shape = resolved_of(story, run), probe(story), story.local.loaded.shape
    train, objective, num_processes = resolved.train, story.config.objective, (story.processes or ALONE).size
    work, largest = workload_of(story, rows, train), largest_pack_of(story, rows, resolved, couples_rows=objective.couples_rows)
    lanes = lanes_of(story, rows, resolved)
    lengths = lengths_of(rows, train, lanes)
    return PlannedRun(
        shape, resolved.method, num_trainable_parameters(shape, resolved.method), num_tokens=work.num_tokens,
        max_tokens_per_pack=max(sum(map(len, largest)), 1), max_row_tokens=max(map(len, largest), default=None),
        num_pack_rows=len(largest) or None, dtype=measured["dtype"], probe_tokens_per_second=measured["train_tokens_per_second"],
        run_tokens_per_second=finished_speed(story, run), write_tokens_per_second=measured["write_tokens_per_second"],
        num_scored_tokens=work.num_scored_tokens, num_written_tokens=work.num_written_tokens,
        num_choosing_tokens=choosing_tokens(rows, resolved.method, shape),
        row_tokens=max(work.num_tokens // max(work.num_rows, 1), 1), loss_share=work.num_loss_tokens / max(work.num_tokens, 1),
        num_steps=work.num_steps, optimizer=train.optimizer, num_anchors=num_anchors(objective, train), has_kl=train.kl_weight > 0,
        activation_checkpointing=train.activation_checkpointing, activation_offload=train.activation_offload,
        num_processes=num_processes, num_shards=num_shards(story, resolved), runtime_bytes=_runtime_bytes(story, measured["dtype"]),
        num_lanes=lanes, lane_speedup=measured["lane_speedup"], num_pack_lengths=len(lengths.packs - story.met_lengths.packs), num_row_lengths=len(lengths.rows - story.met_lengths.rows),
    )  # fmt: skip


def _runtime_bytes(story: Story, dtype: str) -> int:
    """What this process has beside the base's weights: libraries, and what earlier steps left."""
    trim()
    return max(RUNTIME_BYTES, (resident_bytes() or 0) - story.local.loaded.shape.num_parameters * dtype_bytes(dtype))


def _assumed_of_draws(story: Story, run: Run, rows: Sequence[Row]) -> str:
    """What an estimate takes for granted of the answers that are drawn, in a sentence."""
    lengths, limit = drawn_lengths(story, rows), answer_limit(story)
    mean = sum(answer for _, answer in lengths) / max(len(lengths), 1)
    assumed = f"drawn answers are taken to be as long as the author's, {mean:.0f} tokens in the mean of at most {limit}"
    # A finished run's speed has them in it.
    rewarded = story.config.objective.name in ONLINE and finished_speed(story, run) is None
    return f"{assumed}; the time for their rewards is left out" if rewarded else assumed


def num_shards(story: Story, resolved: ResolvedTraining) -> int:
    """Over how many processes a run will spread weights, gradients and optimizer state; 1 where each holds all that moves.

    It is `engine.sharding.shard` that does it, where all weights of the model are trained: those of method `full`.
    """
    return (story.processes or ALONE).size if resolved.method.name == "full" and resolved.train.fsdp else 1


def finished_speed(story: Story, run: Run) -> float | None:
    """Tokens a second that go forward and backward, in steps with all that they do, of all processes together: of this project's finished
    runs with the same recipe, packs of the same size and as many processes on the same machine; None where there is none."""
    num_tokens = seconds = 0.0
    for folder in story.project.list_runs():
        if (folder / "results.json").is_file() and _recipe(record := read_json(folder / "run.json")) == _recipe(run.record):
            results = read_json(folder / "results.json")
            same_place = record["machine"] == run.record["machine"] and results["num_processes"] == (story.processes or ALONE).size
            same_packs = results["max_tokens_per_pack"] == story.config.train.max_tokens_per_pack
            # A run that was killed after its last step came back to nothing to do.
            if same_place and same_packs and results["num_tokens"]:
                num_tokens += results["num_tokens"]
                seconds += results["num_tokens"] / results["tokens_per_second"]
    return num_tokens / seconds if num_tokens else None


def _recipe(record: dict[str, Any]) -> list[Any]:
    """What the speed of a run depends on, of its record."""
    settings = record["settings"]
    train = {name: settings["train"].get(name) for name in ("batch_rows", "kl_weight", "fsdp", "optimizer")}
    return [record["model_identity"], settings["method"], settings.get("objective"), settings["dtype"], train]
