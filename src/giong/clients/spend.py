"""What remote calls have cost: an append-only JSONL record and the cap that it is held against.

The record is the truth and the total in memory only its sum, so that a cap holds over restarts. Money is reserved before
a call and settled after it: eight calls under way at once cannot together pass a cap that each alone would keep.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from giong.errors import DataError, SpendCapReached
from giong.workspace import append_jsonl, mend_torn_end, read_jsonl

# Sums of many small prices round; a billionth of a dollar never decides.
TOLERANCE_USD = 1e-9


class SpendLedger:
    """The cost record of a project and its cap. Safe to share between threads.

    Raises DataError where the record on disk cannot be read: a cap over an unknown sum would be no cap.
    """

    def __init__(self, path: Path, max_usd: float) -> None:
        self.path = Path(path)
        self.max_usd = max_usd
        self._lock = threading.Lock()
        self._reserved_usd = 0.0
        self._spent_usd = self._read_total_usd()

    @property
    def spent_usd(self) -> float:
        """Everything recorded so far, in this process and before it."""
        with self._lock:
            return self._spent_usd

    def reserve(self, estimated_usd: float) -> None:
        """Set money aside for a call. Raises SpendCapReached when spent + reserved + estimate would exceed the cap."""
        with self._lock:
            total_usd = self._spent_usd + self._reserved_usd + estimated_usd
            if estimated_usd > 0 and total_usd > self.max_usd + TOLERANCE_USD:
                raise SpendCapReached(
                    f"The spend cap of ${self.max_usd:.2f} would be passed: ${self._spent_usd:.4f} is spent, "
                    f"${self._reserved_usd:.4f} is under way and the next request may cost ${estimated_usd:.4f}",
                    place=str(self.path), remedy="Raise budget.max_usd and run the same command again; what was answered is kept.",
                )  # fmt: skip
            self._reserved_usd += estimated_usd

    def release(self, reserved_usd: float) -> None:
        """Give back what was set aside for a call that cost nothing."""
        with self._lock:
            self._reserved_usd = max(0.0, self._reserved_usd - reserved_usd)

    def record(
        self, model: str, num_prompt_tokens: int, num_completion_tokens: int, cost_usd: float, purpose: str,
        *, reserved_usd: float = 0.0, estimated: bool = False,
    ) -> None:  # fmt: skip
        """Write down what a call cost and settle its reservation. `estimated` marks calls whose server named no usage."""
        row = {
            "time": time.time(), "model": model, "num_prompt_tokens": num_prompt_tokens,
            "num_completion_tokens": num_completion_tokens, "cost_usd": cost_usd, "purpose": purpose,
        }  # fmt: skip
        if estimated:
            row["estimated"] = True
        with self._lock:
            # Settled even when the disk refuses the line: the money is gone either way.
            self._reserved_usd = max(0.0, self._reserved_usd - reserved_usd)
            self._spent_usd += cost_usd
            append_jsonl(self.path, row)

    def _read_total_usd(self) -> float:
        if not self.path.is_file():
            return 0.0
        total_usd = 0.0
        mend_torn_end(self.path)
        for number, row in enumerate(read_jsonl(self.path), start=1):
            cost_usd = row.get("cost_usd") if isinstance(row, dict) else None
            if not isinstance(cost_usd, int | float):
                raise DataError(
                    "A line of the cost record has no `cost_usd`", place=f"{self.path}:{number}", remedy="Mend or delete that line."
                )
            total_usd += cost_usd
        return total_usd
