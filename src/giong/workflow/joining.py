"""What the other processes of a walk do: wait for a training run, load the model, train along, wait for the next.

One decision a reader may question: only the first process walks the story. Steps read and write the project folder, ask teachers
that cost money and print; none of them needs to know that there are others, and a pilot, a sweep's trial and the final run are
joined alike. What the others need is handed to them, so they never look at the project.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from transformers import PreTrainedModel

from giong.config import MethodConfig, ModelConfig, ObjectiveConfig
from giong.engine.distributed import Processes
from giong.engine.early_stopping import memorisation_score
from giong.engine.kernel_choice import elementwise_of_run
from giong.engine.loop import train
from giong.engine.loop_config import LoopConfig
from giong.engine.memory import ActivationPlan, activation_memory
from giong.engine.score import mean_row_loss
from giong.engine.step import evaluate_objective
from giong.methods import METHODS
from giong.models.load import load_model
from giong.models.rows import Row
from giong.objectives import objective_of
from giong.workflow.probing import DTYPES
from giong.workflow.story import ignore


@dataclass(frozen=True)
class TrainingOrder:
    """One run as the first process is about to train it, every choice made; `given` is what the method needs beside its settings."""

    model: ModelConfig
    dtype: str
    method: MethodConfig
    given: dict[str, Any]
    objective: ObjectiveConfig
    rows: list[Row]
    validation_rows: list[Row]
    config: LoopConfig
    checkpoints: Path
    stage: str
    plan: ActivationPlan
    compiled: bool
    muon_excluded: frozenset[str]
    end_of_turn_ids: tuple[int, ...]

    def validate(self, model: PreTrainedModel) -> Callable[[], float] | None:
        """What measures the validation loss of `model`; None where nothing is measured."""
        if not self.validation_rows:
            return None
        rows, max_tokens = self.validation_rows, self.config.max_tokens_per_pack
        if self.objective.learns_from == "examples":
            return lambda: mean_row_loss(model, rows, max_tokens)
        return lambda: evaluate_objective(model, rows, objective_of(self.objective), max_tokens)["loss"]

    def memorisation(self, model: PreTrainedModel) -> Callable[[], float] | None:
        """What measures how much more is known by heart of the trained rows than of the validation rows; None where it ends no run."""
        if not self.validation_rows or self.config.early_stopping_memorisation is None:
            return None
        # Replayed text has no name, and is not what must not be learned by heart.
        own = [row for row in self.rows if row.name] or self.rows
        return lambda: memorisation_score(model, own, self.validation_rows, self.config.max_tokens_per_pack)


def follow(processes: Processes, should_stop: Callable[[], bool]) -> None:
    """Join run after run until the first process sends everybody home. Raises what broke the processes apart.

    An error that all processes share is the first one's to report, and to go on after.
    """
    while order := processes.wait_for_order(should_stop):
        try:
            _join(processes, order, should_stop)
        except Exception:
            # Also what only its listener knows, as the pruning of a sweep's trial.
            if processes.is_broken:
                raise


def _first_draws(rows: Sequence[Row], step: int) -> NoReturn:
    raise AssertionError("answers are drawn in the first process alone")


def _join(processes: Processes, order: TrainingOrder, should_stop: Callable[[], bool]) -> None:
    with processes.together():
        loaded = load_model(order.model, dtype=DTYPES[order.dtype])
        trainable = METHODS[order.method.name].apply(loaded.model, order.method, seed=order.config.seed, **order.given)
        with elementwise_of_run(trainable.model, compiled=order.compiled), activation_memory(trainable.model, order.plan):
            train(
                trainable.model, trainable.parameters, order.rows, objective_of(order.objective), order.config,
                checkpoints=order.checkpoints, emit=ignore, stage=order.stage, should_stop=should_stop,
                muon_excluded=order.muon_excluded, end_of_turn_ids=order.end_of_turn_ids, validate=order.validate(trainable.model),
                memorisation=order.memorisation(trainable.model), draw=_first_draws if order.objective.is_online else None, processes=processes,
                learning_rate_factors=trainable.learning_rate_factors, couples_rows=order.objective.couples_rows,
            )  # fmt: skip
