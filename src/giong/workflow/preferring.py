"""What the training of preferences needs beside the loop: the reference's scores of the answers, and held-out figures.

One decision a reader may question: the reference is the model as its training begins, read before the first step and kept in the
run's folder. So there is no second model in memory, and a run that is resumed, when its weights have moved, asks nobody.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from giong.config import ObjectiveConfig
from giong.engine.packing import grouped
from giong.engine.step import evaluate_objective, evaluate_rows
from giong.methods import Trainable
from giong.models.rows import Row
from giong.objectives import OBJECTIVES, objective_of
from giong.workflow.joining import TrainingOrder
from giong.workflow.story import Story
from giong.workspace import atomic_write, content_hash

REFERENCE = "reference_logprobs_N"
ROWS_PER_CALL = 64


def needs_reference(objective: ObjectiveConfig) -> bool:
    """Whether the model scores all that it learns from once before its first step."""
    return REFERENCE in OBJECTIVES[objective.name].NEEDS


def referenced(story: Story, trainable: Trainable, rows: Sequence[Row], folder: Path, max_tokens: int, stage_name: str) -> list[Row]:
    """The rows with the log-probabilities that the model gives their answers as it is now, where the objective needs them.

    What has been computed before is read from `folder`, by the content of the rows.
    """
    if not rows or not needs_reference(story.config.objective):
        return list(rows)
    path = folder / f"reference-{content_hash(*(row.input_ids.astype(np.int64).tobytes() for row in rows))}.npy"
    counts = [int(np.count_nonzero(row.weights)) for row in rows]
    if path.is_file():
        values = np.load(path)
    else:
        on_progress, scores = story.progress(stage_name, "answers scored by the reference"), []
        trainable.model.eval()
        for start in range(0, len(rows), ROWS_PER_CALL):
            scores += evaluate_rows(trainable.model, rows[start : start + ROWS_PER_CALL], max_tokens)
            on_progress(len(scores), len(rows))
        values = np.concatenate([part.numpy() for part in scores])
        buffer = io.BytesIO()
        np.save(buffer, values)
        with atomic_write(path) as stream:
            stream.write(buffer.getvalue())
    parts = np.split(values, np.cumsum(counts)[:-1])
    return [dataclasses.replace(row, extras={**row.extras, REFERENCE: part}) for row, part in zip(rows, parts)]


def held_out_figures(story: Story, trainable: Trainable, order: TrainingOrder, stage_name: str) -> dict[str, Any]:
    """The objective's figures on the held-out pairs, for the run's results; none where it learns from examples."""
    # Weights that were spread over processes are whole again, but cannot compute.
    spread = trainable.format == "weights" and order.config.fsdp and story.processes is not None
    if order.objective.learns_from == "examples" or spread:
        return {}
    figures = evaluate_objective(trainable.model, order.validation_rows, objective_of(order.objective), order.config.max_tokens_per_pack)
    told = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in figures.items())
    story.notice(stage_name, f"{len(grouped(order.validation_rows))} held-out {order.objective.learns_from}: {told}")
    return {"held_out": figures}
