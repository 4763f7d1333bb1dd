"""The training loop: the only one. Model, rows, objective and what moves are arguments; it knows none of them.

One decision a reader may question: every random choice (order, dropout) is derived from the seed and the number of the
step, and never from a generator that runs along, so that a resumed run needs no generator state to repeat the bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
import torch
from transformers import PreTrainedModel

from giong.contracts import Emit, Event, LossSum
from giong.engine import value_head
from giong.engine.anchor import Anchor, with_kl
from giong.engine.checkpoint import (
    CheckpointWriter,
    Tensors,
    best_checkpoint,
    list_checkpoints,
    lowest_validation_loss,
    require_room_for_run,
    set_aside,
    tidy_checkpoints,
)
from giong.engine.distributed import ALONE, Processes
from giong.engine.early_stopping import EarlyStopping
from giong.engine.embedding_noise import EmbeddingNoise
from giong.engine.feed import Batch, Corrupt, WaitClock, batches
from giong.engine.health import FirstSteps, diagnose_labels, diagnose_rates, diagnose_rows
from giong.engine.heap import HeapTrimmer
from giong.engine.loop_config import LoopConfig, TrainResult
from giong.engine.optimizer import MasterOptimizer, learning_rate_at
from giong.engine.out_of_memory import drop_gradients, is_out_of_memory, memory_errors, release_memory, smaller_budget
from giong.engine.packing import group_lengths, grouped, plan_steps
from giong.engine.report import Report, listed
from giong.engine.rollout import Draw
from giong.engine.sharded_checkpoint import checkpoint_writer, read_checkpoint
from giong.engine.sharding import shard, unshard
from giong.engine.step import Forward, Objective, backward, forward
from giong.engine.watchdog import LossWatch, rows_without_a_finite_loss
from giong.errors import ConfigError, DataError, Interrupted, ResourceError, TrainingError
from giong.models.rows import Row

UNPROVED_STEPS = 2
"""Steps that a run does at most before it knows that it can save: the proof is written behind them."""


class _StopWanted(Exception):
    """Raised between two packs of a step: the step is dropped, not finished."""


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
    learning_rate_factors: Mapping[str, float] = MappingProxyType({}),
    on_checkpoint: Callable[[int], None] = lambda step: None,
    end_of_turn_ids: Sequence[int] = (),
    validate: Callable[[], float] | None = None,
    memorisation: Callable[[], float] | None = None,
    draw: Draw | None = None,
    processes: Processes = ALONE,
    couples_rows: bool = False,
    corrupt: Corrupt | None = None,
    forward: Forward = forward,
) -> TrainResult:
    """Train `parameters` in place; resumes from the newest checkpoint in `checkpoints` that can be read, when there is one.

    `should_stop` is asked between packs. `learning_rate_factors` are those of single parameters, where the rates differ. `end_of_turn_ids` are the tokens that may end an answer, none for raw text.
    `validate` measures the loss by which the best checkpoint is kept, with the model in evaluation mode, every `eval_steps` and at
    the end: never when the clock asks for a checkpoint, or the choice would be the clock's. `memorisation` is measured with it, where
    that may end the run. `draw` replaces the rows of a step by answers that the model draws there (online objectives); each step may
    then hold several updates. `on_checkpoint` is called when a
    checkpoint is on the disk. Of several `processes` each calls this with the same arguments; the first one emits, writes, and can
    save the model afterwards. `couples_rows` says that the loss of a row depends on the other rows of its step: they share one pass.
    `corrupt` changes the rows of a step before they are computed, by the number of the step; `forward` makes named tensors of a pack.

    Raises Interrupted (after saving) when `should_stop` turns true; TrainingError when the loss is no number, diverges, or
    nothing moves (the last good checkpoint stays); DataError for rows or labels that teach nothing; ResourceError when disk
    or memory do not suffice.
    """
    report = Report(emit if processes.is_first else lambda event: None, stage)
    report.diagnoses(diagnose_rows(rows, end_of_turn_ids), 0)
    # Each has a name from here on: what is made of it within a step, as the answers to its request, is called by it in messages.
    kept = [row if row.name else replace(row, name=f"row {index}") for index, row in enumerate(rows) if row.loss_weight]
    groups = grouped(kept)
    # A group counts as one row of a step.
    planned = plan_steps(len(groups), config.batch_rows, config.num_epochs, config.seed)
    steps = [np.concatenate([groups[index] for index in step]) for step in planned]
    rates = _learning_rates(config, len(steps))
    report.diagnoses(diagnose_rates(rates), 0)
    num_parameters, num_kept = sum(parameter.numel() for parameter in parameters.values()), config.keep_checkpoints + (validate is not None)
    dtype = model.dtype
    with processes.together():
        processes.first(lambda: tidy_checkpoints(checkpoints, config.keep_checkpoints))
        processes.first(lambda: require_room_for_run(checkpoints, num_parameters, num_kept))
        optimizer = MasterOptimizer(
            shard(model, parameters, processes, wanted=config.fsdp), optimizer=config.optimizer, learning_rate=config.learning_rate,
            weight_decay=config.weight_decay, muon_excluded=muon_excluded, learning_rate_factors=learning_rate_factors,
            processes=processes,
        )  # fmt: skip
        run = _Run(
            model, optimizer, kept, steps, rates, objective, config, report, should_stop, validate,
            on_checkpoint, config.max_tokens_per_pack, memorisation, couples_rows, draw, corrupt, forward,
        )  # fmt: skip
        model.train()
        try:
            run.prepare()
            run.resume(checkpoints)
            writing = checkpoint_writer(checkpoints, config.keep_checkpoints, run.announce, processes)
            with writing as writer, processes.saying_at_once(), run.noise.on(model) if run.noise else nullcontext():
                result = run.perform(writer)
            if config.load_best_model_at_end:
                run.take_best(checkpoints)
            unshard(model, dtype, processes)
            return result
        finally:
            optimizer.close()
            model.eval()


def _learning_rates(config: LoopConfig, num_steps: int) -> list[float]:
    peak, warmup_share, schedule = config.learning_rate, config.warmup_share, config.schedule
    return [learning_rate_at(step, num_steps, peak=peak, warmup_share=warmup_share, schedule=schedule) for step in range(num_steps)]


@dataclass(slots=True)
class _Run:
    """What the parts of one call of `train` share. `first` is the step that this process begins with."""

    model: PreTrainedModel
    optimizer: MasterOptimizer
    rows: Sequence[Row]
    steps: Sequence[np.ndarray]
    rates: Sequence[float]
    objective: Objective
    config: LoopConfig
    report: Report
    should_stop: Callable[[], bool]
    validate: Callable[[], float] | None
    on_checkpoint: Callable[[int], None]
    max_tokens_per_pack: int
    memorisation: Callable[[], float] | None
    couples_rows: bool
    draw: Draw | None
    corrupt: Corrupt | None
    forward: Forward
    first: int = 0
    loss: float = math.nan
    watch: LossWatch = field(default_factory=LossWatch)
    saved_step: int | None = None
    saved_at: float = field(default_factory=time.monotonic)
    anchor: Anchor | None = None
    noise: EmbeddingNoise | None = None
    stopping: EarlyStopping = field(default_factory=EarlyStopping)
    waiting: WaitClock = field(default_factory=WaitClock)
    is_midway: bool = False
    generate_seconds: float = 0.0

    @property
    def processes(self) -> Processes:
        return self.optimizer.processes

    def prepare(self) -> None:
        """What the options of the run need from the weights as they are before it."""
        config = self.config
        self.stopping = EarlyStopping(config.early_stopping_patience, config.early_stopping_memorisation)
        if config.neftune_noise_alpha is not None:
            self.noise = EmbeddingNoise(config.neftune_noise_alpha)
        if config.kl_weight and self.processes.sharded:
            raise ConfigError(
                "The base cannot be computed from weights that are spread over processes", place="train.kl_weight",
                remedy="Set train.fsdp to false, or train.kl_weight to 0.",
            )  # fmt: skip
        if self.draw and self.processes.sharded:
            raise ConfigError(
                "Weights that are spread over processes cannot write answers", place="train.fsdp",
                remedy="Set train.fsdp to false, or train an adapter.",
            )  # fmt: skip
        if config.kl_weight or config.l2_to_base:
            self.optimizer.write_parameters()
            # What is beside the model has no base to be held at.
            self.anchor = Anchor({name: each for name, each in self.optimizer.parameters.items() if name not in value_head.NAMES})

    def resume(self, folder: Path) -> None:
        """Take up the newest checkpoint that can be read, if there is one."""
        found = self.processes.first(lambda: list_checkpoints(folder))
        if not found:
            self.optimizer.write_parameters()
            return
        state = self.load(*self.read_newest(found))
        self.first = self.saved_step = state["step"]
        self.loss = math.nan if state["loss"] is None else state["loss"]
        self.max_tokens_per_pack = min(self.max_tokens_per_pack, state.get("max_tokens_per_pack", self.max_tokens_per_pack))
        self.watch = LossWatch(**state.get("watch", {}))
        self.stopping = replace(self.stopping, **state.get("early_stopping", {}))
        self.report.notice(f"going on from step {self.first} of {len(self.steps)}", self.first)

    def read_newest(self, found: Sequence[Path]) -> tuple[Path, Tensors, dict[str, Any]]:
        """The newest of these checkpoints that can be read, with what it holds: steps repeat exactly, so an older one costs only time."""
        *older, newest = found
        try:
            return newest, *read_checkpoint(newest, self.optimizer, self.processes)
        except DataError as error:
            if not older:
                raise
            told = error.message
        taken = self.read_newest(older)
        # Not before another one has been read: what keeps all from being read may pass.
        aside = self.processes.first(lambda: set_aside(newest))
        self.report.notice(f"{told} ({aside}). It is left out: {taken[0].name} is taken up", self.first)
        return taken

    def load(self, checkpoint: Path, tensors: Tensors, state: dict[str, Any]) -> dict[str, Any]:
        """Put the weights and the optimizer where they were at a checkpoint; returns its state."""
        try:
            self.optimizer.load_state_tensors(tensors)
        except (KeyError, RuntimeError) as error:
            raise DataError(
                "This checkpoint belongs to a run with other parameters", place=str(checkpoint),
                remedy="Go on with the settings that the run began with, or delete its folder to begin anew.",
            ) from error  # fmt: skip
        return state

    def take_best(self, folder: Path) -> None:
        """Go back to the weights with the lowest validation loss."""
        best = self.processes.first(lambda: best_checkpoint(folder))
        if best is not None:
            step = self.load(best, *read_checkpoint(best, self.optimizer, self.processes))["step"]
            self.report.notice(f"the weights of step {step} of {len(self.steps)} are kept: lowest validation loss", step)

    def perform(self, writer: CheckpointWriter) -> TrainResult:
        """All steps that are left."""
        started = time.monotonic()
        num_tokens, step_seconds, waited_seconds = 0, 0.0, 0.0
        health = FirstSteps(self.optimizer.state_tensors(), self.first)
        heap = HeapTrimmer()
        last = self.first if self.stopping.reason else len(self.steps)
        with closing(batches(self.rows, self.steps[:last], self.first, self.corrupt)) as feed:
            for batch in self.waiting.over(feed):
                waited = self.waiting.lap()
                if batch.step == self.first + UNPROVED_STEPS:
                    writer.wait()
                else:
                    writer.poll()
                if self.processes.any(self.should_stop()):
                    self.leave(batch.step, writer)
                if batch.step == 0:
                    self.report.diagnoses(diagnose_labels(self.model, batch.rows), 0)
                # A step begins where it asks for its rows.
                step_started = time.monotonic() - waited
                try:
                    figures = self.step(batch)
                except _StopWanted:
                    self.leave(batch.step, writer)
                seconds, done = time.monotonic() - step_started, batch.step + 1
                waited += self.waiting.lap()
                num_tokens, step_seconds, waited_seconds = (
                    num_tokens + figures["num_tokens"],
                    step_seconds + seconds,
                    waited_seconds + waited,
                )
                speed = {"tokens_per_second": figures["num_tokens"] / seconds, "wait_share": waited / seconds}
                # Whoever listens may end the run, for all.
                self.processes.first(partial(self.report.step, done, {**figures, **speed}))
                if not health.is_over:
                    found = health.after_step(self.optimizer.state_tensors(), figures["grad_norm"], is_last=done == len(self.steps))
                    self.report.diagnoses(found, done)
                # The loss of an online objective is no measure of anything: its answers change with the model.
                if self.draw is None and self.watch.observe(self.loss):
                    self.diverged(done)
                if batch.step == self.first and done < len(self.steps):
                    writer.prove(self.optimizer.state_tensors(), self.state())
                if self.is_due(done):
                    self.save(done, writer)
                heap.after_step()
                if self.stopping.reason:
                    self.report.notice(f"stopped after step {done} of {len(self.steps)}: {self.stopping.reason}", done)
                    last = done
                    break
        if self.first < last:
            if self.saved_step != last:
                self.save(last, writer)
            writer.wait()
            share = waited_seconds / step_seconds
            self.report.notice(
                f"{num_tokens / step_seconds:,.0f} tokens a second; steps waited for their rows and packs {share:.1%} of the time", last
            )
        seconds = time.monotonic() - started
        validation_loss, best_step = self.processes.first(lambda: lowest_validation_loss(writer.folder))
        return TrainResult(
            last, num_tokens, self.loss, seconds, num_tokens / seconds if seconds > 0 else 0.0,
            waited_seconds / step_seconds if step_seconds else 0.0, self.max_tokens_per_pack, validation_loss, best_step, self.stopping.reason if last < len(self.steps) else "",
            self.generate_seconds / seconds if seconds > 0 else 0.0,
        )  # fmt: skip

    def step(self, batch: Batch) -> dict[str, float]:
        """The update of a step, or those of the answers drawn in it; the figures of the last one."""
        if self.draw is None:
            return self.update(batch)
        draw = self.draw
        drawn = self.processes.first(lambda: draw(batch.rows, batch.step))
        self.generate_seconds += drawn.seconds
        self.model.train()
        num_tokens, figures = 0, {}
        for number, rows in enumerate(drawn.updates):
            # Between two updates nobody leaves: what a checkpoint holds is where a step begins.
            self.is_midway = number > 0
            figures = self.update(replace(batch, rows=rows))
            num_tokens += figures["num_tokens"]
        self.is_midway = False
        if drawn.stop:
            self.stopping = replace(self.stopping, reason=drawn.stop)
        return {**figures, **drawn.figures, "num_tokens": num_tokens, "generate_seconds": drawn.seconds}

    def update(self, batch: Batch) -> dict[str, float]:
        """Forward, backward and update; its figures. Weights that are numbers stay numbers."""
        figures = self.accumulate(batch)
        learning_rate = self.rates[batch.step]
        self.loss, grad_norm = figures["loss"], math.nan
        if math.isfinite(self.loss):
            if self.anchor and self.config.l2_to_base:
                self.anchor.pull(self.optimizer.masters, learning_rate * self.config.l2_to_base)
            with memory_errors("The optimizer's state does not fit into memory"):
                grad_norm = self.optimizer.step(learning_rate, self.config.max_grad_norm)
        if not math.isfinite(grad_norm):
            self.left_the_numbers(batch, grad_norm)
        return {
            **figures, "num_steps": len(self.steps), "learning_rate": learning_rate, "grad_norm": grad_norm, "num_tokens": batch.num_tokens,
        }  # fmt: skip

    def accumulate(self, batch: Batch) -> dict[str, float]:
        """The gradient of the step's rows; from zero again with smaller packs, as often as memory does not suffice."""

        def objective(tensors: dict[str, torch.Tensor]) -> LossSum:
            if not self.is_midway and self.processes.wants(self.should_stop()):
                raise _StopWanted
            result = self.objective(tensors)
            return with_kl(result, tensors, self.config.kl_weight) if self.config.kl_weight else result

        compute = partial(self.anchor.forward, forward=self.forward) if self.anchor and self.config.kl_weight else self.forward
        if self.noise:
            self.noise.step_seed = step_seed(self.config.seed, batch.step)
        num_tokens = sum(map(len, batch.rows))
        while True:
            torch.manual_seed(self.processes.seed(step_seed(self.config.seed, batch.step)))
            try:
                return self.processes.sum_of(
                    lambda: backward(
                        self.model,
                        batch.rows,
                        objective,
                        None if self.couples_rows else self.max_tokens_per_pack,
                        self.processes,
                        compute,
                        self.waiting.over,
                    )
                )
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.couples_rows:
                    raise ResourceError(
                        f"{len(batch.rows)} rows that are compared with each other, {num_tokens} tokens, do not fit into memory",
                        place=self.report.stage, remedy="Lower train.batch_rows or model.max_seq_length: such rows cannot be parted.",
                    ) from error  # fmt: skip
                if self.processes.sharded:
                    raise ResourceError(
                        f"A pack of {self.max_tokens_per_pack} tokens does not fit into memory beside the shards", place=self.report.stage,
                        remedy="Lower train.max_tokens_per_pack: one process cannot make its packs smaller without the others.",
                    ) from error  # fmt: skip
            drop_gradients(self.optimizer)
            release_memory()
            lengths = group_lengths(batch.rows)
            smaller = smaller_budget(lengths, self.max_tokens_per_pack)
            if smaller is None:
                longest = grouped(batch.rows)[int(np.argmax(lengths))]
                raise ResourceError(
                    f"A single {'row' if len(longest) == 1 else 'pair'} of {max(lengths)} tokens does not fit into memory",
                    place=batch.rows[longest[0]].name,
                    remedy="Lower model.max_seq_length, leave that row out, or take a smaller model.",
                )  # fmt: skip
            self.max_tokens_per_pack = smaller
            self.report.notice(
                f"memory ran out: the same rows per step, in packs of at most {smaller} tokens from now on",
                batch.step,
                max_tokens_per_pack=smaller,
            )

    def is_due(self, done: int) -> bool:
        """Whether a checkpoint is to be written now. None while the loss is a worry: it would push out a good one."""
        every = self.config.save_steps
        by_count = self.is_evaluated(done) or (every is not None and done // every > (self.saved_step or 0) // every)
        by_time = time.monotonic() - self.saved_at > self.config.save_seconds
        # Clocks differ between processes: the first one's counts.
        return self.processes.first(lambda: (by_count or by_time) and not self.watch.is_worried and done < len(self.steps))

    def is_evaluated(self, done: int) -> bool:
        """Whether the validation loss is measured after so many steps."""
        every = self.config.eval_steps
        return self.validate is not None and (done == len(self.steps) or (every is not None and done % every == 0))

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors."""
        loss = self.loss if math.isfinite(self.loss) else None
        stopping = {"early_stopping": asdict(self.stopping)} if self.stopping.is_on else {}
        return {"loss": loss, "max_tokens_per_pack": self.max_tokens_per_pack, "watch": asdict(self.watch), **stopping}

    def save(self, step: int, writer: CheckpointWriter) -> None:
        """Begin to write a checkpoint, with its validation loss where that is measured."""
        state = self.state()
        # Where the weights are whole in each process, the first one's word is enough.
        if self.validate and self.is_evaluated(step) and (self.processes.is_first or self.processes.sharded):
            self.model.eval()
            with torch.no_grad():
                loss = self.validate()
                memorised = self.memorisation() if self.memorisation else None
            self.model.train()
            state["validation_loss"] = loss if math.isfinite(loss) else None
            if memorised is not None:
                state["memorisation"] = memorised
            self.stopping = self.stopping.after(loss, memorised)
        if self.stopping.is_on:
            self.stopping = self.processes.first(lambda: self.stopping)
            state["early_stopping"] = asdict(self.stopping)
        writer.save(step, self.optimizer.state_tensors(), state)
        self.saved_step, self.saved_at = step, time.monotonic()

    def leave(self, step: int, writer: CheckpointWriter) -> NoReturn:
        """Save, unless the last checkpoint is of this very step, and go: whoever stops a run does not wait for a validation.

        Nor is anything saved while the loss is a worry: it would push out a good checkpoint, which the same steps follow from.
        """
        if self.watch.is_worried and self.saved_step is not None:
            kept = f"the checkpoint of step {self.saved_step} is kept, and the run goes on from there"
            self.report.notice(f"the loss has risen too far for a checkpoint of step {step}: {kept}", step)
        elif self.saved_step != step:
            writer.save(step, self.optimizer.state_tensors(), self.state())
        # All wait for the write: a process that ended before it would have the launcher end the one that writes.
        self.processes.first(writer.wait)
        raise Interrupted("Stopped by request", remedy="Run the same command again to go on.")

    def announce(self, step: int, state: Mapping[str, Any]) -> None:
        """A checkpoint is on the disk."""
        measured = {name: state[name] for name in ("validation_loss", "memorisation") if name in state}
        self.report.emit(Event("checkpoint", self.report.stage, data={"step": step, **measured}))
        self.on_checkpoint(step)

    def left_the_numbers(self, batch: Batch, grad_norm: float) -> NoReturn:
        """Name the rows whose own loss is no number, or all rows of the step where each alone is well."""
        names = [row.name for row in batch.rows]
        alone = [names[index] for index in rows_without_a_finite_loss(self.model, batch.rows)]
        # All leave when the slowest has looked: see `Processes.together`.
        self.processes.any(False)
        named = listed(list(dict.fromkeys(alone or names)))
        raise TrainingError(
            f"Training left the numbers at step {batch.step + 1} (loss {self.loss}, gradient norm {grad_norm}; rows {named})",
            remedy=f"Look at these rows, or lower train.learning_rate; {self.what_is_kept()}.",
        )  # fmt: skip

    def diverged(self, done: int) -> NoReturn:
        """Stop; the checkpoints are from before the loss became a worry."""
        began = done - self.watch.num_worried
        raise TrainingError(
            f"Training diverged: the smoothed loss is {self.watch.smoothed:.3g} after {self.watch.best_or_start:.3g} at its best, "
            f"since step {began + 1} (rows {listed([self.rows[index].name for index in self.steps[began]])})",
            remedy=f"Lower train.learning_rate; {self.what_is_kept()}.",
        )  # fmt: skip

    def what_is_kept(self) -> str:
        if self.saved_step:
            return f"the checkpoint of step {self.saved_step} is kept"
        return "no checkpoint was due before (train.save_steps, train.save_seconds)"


def step_seed(seed: int, step: int) -> int:
    """What the random choices of one step begin with. Both numbers are in every bit: torch on a CPU looks at the lower 32 alone."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0]) >> 1
