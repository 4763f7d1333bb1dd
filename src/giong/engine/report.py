"""What the training loop says: its events, and the rows that a message names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from giong.contracts import Emit, Event
from giong.engine.health import Diagnosis

NAMED_ROWS = 12
"""Rows that a message names at most."""


class Report:
    """The loop's events. All but `checkpoint` come from here; each carries `step`, the number of steps done."""

    def __init__(self, emit: Emit, stage: str) -> None:
        self.emit, self.stage = emit, stage

    def step(self, step: int, figures: Mapping[str, Any]) -> None:
        self.emit(Event("step", self.stage, data={**figures, "step": step}))

    def notice(self, message: str, step: int, **data: Any) -> None:
        self.emit(Event("notice", self.stage, message, {**data, "step": step}))

    def diagnoses(self, found: Iterable[Diagnosis], step: int) -> None:
        """Say what was found; raise the first that makes the run worthless."""
        for diagnosis in found:
            self.notice(f"{diagnosis.message}. {diagnosis.remedy}", step, diagnosis=diagnosis.name)
            if diagnosis.error:
                raise diagnosis.error(diagnosis.message, place=self.stage, remedy=diagnosis.remedy)


def listed(names: Sequence[str]) -> str:
    """The first of the names, in brackets."""
    more = f" and {len(names) - NAMED_ROWS} more" if len(names) > NAMED_ROWS else ""
    return f"[{', '.join(names[:NAMED_ROWS])}{more}]"
