"""The training loop: the only one. Model, rows, objective and what moves are arguments; it knows none of them.

One decision a reader may question: every random choice (order, dropout) is derived from the seed and the number of the
step, and never from a generator that runs along, so that a resumed run needs no generator state to repeat the bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from giong.contracts import Emit, Event
from giong.engine.checkpoint import list_checkpoints, load_checkpoint, prune_checkpoints, save_checkpoint
from giong.engine.optimizer import MasterOptimizer, learning_rate_at
from giong.engine.packing import plan_steps
from giong.engine.step import Objective, backward
from giong.errors import DataError, GiongError, Interrupted
from giong.models.rows import Row


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """The settings of one run with every default resolved. Names and meanings are those of the config section `train`."""

    learning_rate: float
    num_epochs: float
    batch_rows: int
    max_tokens_per_pack: int
    warmup_share: float
    schedule: str
    optimizer: str
    weight_decay: float
    max_grad_norm: float
    seed: int
    save_seconds: float
    save_steps: int | None
    keep_checkpoints: int


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a finished run measured. `seconds` and `tokens_per_second` count this process's steps only."""

    num_steps: int
    num_tokens: int
    final_loss: float
    seconds: float
    tokens_per_second: float


def train(
    model: PreTrainedModel,
    parameters: Mapping[str, torch.nn.Parameter],
    rows: Sequence[Row],
    objective: Objective,
    config: LoopConfig,
    *,
    checkpoints: Path,
    emit: Emit,
    stage: str = "train",
    should_stop: Callable[[], bool] = lambda: False,
    muon_excluded: frozenset[str] = frozenset(),
    on_checkpoint: Callable[[int], None] = lambda step: None,
) -> TrainResult:
    """Train `parameters` in place; resumes from the newest checkpoint in `checkpoints` when there is one.

    Raises Interrupted (after saving) when `should_stop` turns true, DataError when no row carries loss, and GiongError
    when the loss stops being a number: the last good checkpoint stays.
    """
    rows_with_loss = [row for row in rows if row.weights.any()]
    if not rows_with_loss:
        raise DataError("No token of the training rows carries loss", remedy="Check the data and `max_seq_length`.")
    steps = plan_steps(len(rows_with_loss), config.batch_rows, config.num_epochs, config.seed)
    optimizer = MasterOptimizer(
        parameters,
        optimizer=config.optimizer,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        muon_excluded=muon_excluded,
    )
    model.train()
    try:
        # A kill between writing a checkpoint and removing an old one leaves one too many.
        prune_checkpoints(checkpoints, config.keep_checkpoints)
        first, loss = _resume(optimizer, checkpoints, emit, stage, len(steps))
        return _run_steps(
            model, optimizer, rows_with_loss, steps, first, loss, objective, config, checkpoints, emit, stage, should_stop, on_checkpoint
        )
    finally:
        optimizer.close()
        model.eval()


def _resume(optimizer: MasterOptimizer, checkpoints: Path, emit: Emit, stage: str, num_steps: int) -> tuple[int, float]:
    """(step to go on with, loss of the step before it)."""
    found = list_checkpoints(checkpoints)
    if not found:
        optimizer.write_parameters()
        return 0, math.nan
    tensors, state = load_checkpoint(found[-1])
    try:
        optimizer.load_state_tensors(tensors)
    except (KeyError, RuntimeError) as error:
        raise DataError(
            "This checkpoint belongs to a run with other parameters", place=str(found[-1]),
            remedy="Go on with the settings that the run began with, or delete its folder to begin anew.",
        ) from error  # fmt: skip
    emit(Event("notice", stage, f"going on from step {state['step']} of {num_steps}", {"step": state["step"]}))
    return int(state["step"]), math.nan if state["loss"] is None else float(state["loss"])


def _run_steps(
    model: PreTrainedModel,
    optimizer: MasterOptimizer,
    rows: Sequence[Row],
    steps: Sequence,
    first: int,
    loss: float,
    objective: Objective,
    config: LoopConfig,
    checkpoints: Path,
    emit: Emit,
    stage: str,
    should_stop: Callable[[], bool],
    on_checkpoint: Callable[[int], None],
) -> TrainResult:
    started = saved = time.monotonic()
    num_tokens, resumed = 0, first > 0

    def save(step: int) -> None:
        nonlocal saved
        state = {"loss": loss if math.isfinite(loss) else None}
        save_checkpoint(checkpoints, step, optimizer.state_tensors(), state, config.keep_checkpoints)
        saved = time.monotonic()
        emit(Event("checkpoint", stage, data={"step": step}))
        on_checkpoint(step)

    for step in range(first, len(steps)):
        if should_stop():
            # What was just resumed from is on disk already; writing it again could only lose it.
            if not (resumed and step == first):
                save(step)
            raise Interrupted("Stopped by request", remedy="Run the same command again to go on.")
        torch.manual_seed((config.seed << 32) ^ step)
        batch = [rows[index] for index in steps[step]]
        step_started = time.monotonic()
        figures = backward(model, batch, objective, config.max_tokens_per_pack)
        learning_rate = learning_rate_at(
            step, len(steps), peak=config.learning_rate, warmup_share=config.warmup_share, schedule=config.schedule
        )
        grad_norm = optimizer.step(learning_rate, config.max_grad_norm)
        loss = figures["loss"]
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise GiongError(
                f"Training left the numbers at step {step + 1} (loss {loss}, gradient norm {grad_norm}; rows {steps[step].tolist()})",
                place=str(checkpoints), remedy="Lower train.learning_rate; the last checkpoint is kept.",
            )  # fmt: skip
        tokens = sum(len(row) for row in batch)
        num_tokens += tokens
        emit(
            Event(
                "step", stage,
                data={
                    **figures, "step": step + 1, "num_steps": len(steps), "learning_rate": learning_rate, "grad_norm": grad_norm,
                    "num_tokens": tokens, "tokens_per_second": tokens / (time.monotonic() - step_started),
                },
            )
        )  # fmt: skip
        finished = step + 1 == len(steps)
        due = time.monotonic() - saved > config.save_seconds or (config.save_steps and (step + 1) % config.save_steps == 0)
        if due and not finished:
            save(step + 1)
    if first < len(steps):
        save(len(steps))
    seconds = time.monotonic() - started
    return TrainResult(len(steps), num_tokens, loss, seconds, num_tokens / seconds if seconds > 0 else 0.0)
