"""What a method needs beside its settings and the base: for `sparse`, which weights move.

It is found on the training rows once per run and kept in the run's folder. One decision a reader may question: even where it could be
worked out again. A resumed run, or another process, that chose but one weight otherwise would put every value after it in a wrong place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save
from transformers import PreTrainedModel

from giong.config import MethodConfig
from giong.engine.packing import grouped
from giong.engine.step import Objective, backward
from giong.methods.sparse import choose
from giong.models.rows import Row
from giong.sizing.defaults import ResolvedTraining
from giong.sizing.units import format_seconds
from giong.workspace import atomic_write

INDICES_FILE = "indices.safetensors"


def given_to_method(
    model: PreTrainedModel, rows: Sequence[Row], resolved: ResolvedTraining, objective: Objective, folder: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Keyword arguments of the method's `apply`, empty for methods that need nothing; `folder` is the run's."""
    method = resolved.method
    if method.name != "sparse":
        return {}
    path = folder / INDICES_FILE
    if not path.is_file():
        started, chosen_groups = time.monotonic(), _calibration_groups(rows, method, resolved.train.seed)

        def go_through_rows() -> None:
            for group in chosen_groups:
                backward(model, group, objective, None)

        indices = choose(model, method, go_through_rows, seed=resolved.train.seed)
        with atomic_write(path) as stream:
            stream.write(save(indices))
        by_rows = f" on {len(chosen_groups)} rows" if method.sparse_score in ("fisher", "gradient") else ""
        say(
            f"{sum(map(len, indices.values())):,} weights of {len(indices)} matrices chosen by {method.sparse_score}{by_rows} "
            f"({format_seconds(time.monotonic() - started)})"
        )
    return {"indices": load_file(path)}


def _calibration_groups(rows: Sequence[Row], method: MethodConfig, seed: int) -> list[list[Row]]:
    taught = [row for row in rows if row.loss_weight]
    groups = grouped(taught)
    order = np.random.Generator(np.random.Philox(key=[seed, 1])).permutation(len(groups))
    return [[taught[member] for member in groups[index]] for index in order[: method.sparse_rows]]
