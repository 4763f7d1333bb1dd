"""What a synthesis made, left out and cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A passage that got no request of a kind, and why. `failed` ones are asked again by the next run, others are not."""

    passage_id: str
    kind: str
    reason: str
    num_attempts: int = 0
    failed: bool = False


@dataclass(slots=True)
class SynthesisReport:
    """`num_asked` are requests sent in this run, `num_resumed` answers taken from the journal; `cost_usd` is of all of them."""

    teacher: str
    num_passages: int = 0
    num_examples: int = 0
    num_asked: int = 0
    num_resumed: int = 0
    num_rejected: int = 0
    cost_usd: float = 0.0
    examples_per_kind: dict[str, int] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
