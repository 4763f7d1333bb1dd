"""What an online objective learns from: answers that the model drew in this very step, already judged.

The engine neither generates nor judges. Whoever calls `train` hands it a function from the rows of a step (whose requests are asked)
and its number to a `Rollout`; it is called before the step's first update, in the first process alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from giong.models.rows import Row


@dataclass(frozen=True, slots=True)
class Rollout:
    """The rows of each update of a step, figures for its record, the seconds it took, and why the run should end (or nothing)."""

    updates: list[list[Row]]
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    stop: str = ""


Draw = Callable[[Sequence[Row], int], Rollout]
