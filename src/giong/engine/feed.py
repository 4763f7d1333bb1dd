"""The rows of each step, fetched ahead of it by a thread; how long a step had to wait for them is measured.

A thread and not a process: what is left to do per step is copying a few thousand integers off a memory map (packing eight
rows of 440 tokens takes 0.3 ms), and a process would pickle the same bytes. The order is that of the plan alone, so timing
cannot change a run.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from giong.models.rows import Row

STEPS_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one optimizer step (numbered from 0), and how long the loop waited for them."""

    step: int
    rows: list[Row]
    waited_seconds: float

    @property
    def num_tokens(self) -> int:
        return sum(len(row) for row in self.rows)


Corrupt = Callable[[Sequence[Row], int], list[Row]]
"""What becomes of the rows of a step, by its number alone: a resumed run sees the same."""


def batches(rows: Sequence[Row], steps: Sequence[np.ndarray], first: int, corrupt: Corrupt | None = None) -> Iterator[Batch]:
    """The steps of a plan from number `first` on. Close it (`contextlib.closing`) when it is left early."""
    with ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
        following = iter(range(first, len(steps)))
        ahead: deque = deque()

        def fetch_next() -> None:
            for step in following:
                ahead.append((step, pool.submit(_fetch, rows, steps[step], step, corrupt)))
                return

        for _ in range(STEPS_AHEAD):
            fetch_next()
        while ahead:
            started = time.monotonic()
            step, fetched = ahead.popleft()
            batch = Batch(step, fetched.result(), time.monotonic() - started)
            fetch_next()
            yield batch


def _fetch(rows: Sequence[Row], indices: np.ndarray, step: int, corrupt: Corrupt | None) -> list[Row]:
    # A copy: rows may lie on a memory map, and the disk is read here instead of in the step.
    chosen = (rows[index] for index in indices)
    copied = [replace(row, input_ids=np.array(row.input_ids), weights=np.array(row.weights)) for row in chosen]
    return corrupt(copied, step) if corrupt else copied
