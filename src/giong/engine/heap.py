"""Memory that glibc keeps: given back now and then, because packs of ever new lengths leave holes in it.

The workers' allocator settings keep freed tensors below 32 MiB in the heap, which is what makes steps fast. But a heap shrinks only
at its end, and with thousands of packs of different lengths there is always something alive there: a process that trained the bundled
base in full, with 25 million tokens of rows in memory, had grown to 7 GB within an hour; trimmed once a minute it moves between 3 and
5 GB. `malloc_trim` hands back the whole pages inside the heap too (glibc 2.8 and newer).
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import lru_cache

TRIM_SECONDS = 60.0
"""Pages that are handed back have to be faulted in again at the next step: a fraction of a second, so not at every one."""


@lru_cache(maxsize=1)
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        # Not glibc: musl, macOS and Windows have allocators of their own.
        return None


def trim() -> bool:
    """Hand free pages of the heap back to the system; whether there were any. Does nothing where the C library is not glibc."""
    function = _malloc_trim()
    return function is not None and bool(function(0))


class HeapTrimmer:
    """Trims after the first step that ends `seconds` or more after the last time."""

    def __init__(self, seconds: float = TRIM_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock = seconds, clock
        self._last = clock()

    def after_step(self) -> bool:
        """Whether it was time."""
        if self.clock() - self._last < self.seconds:
            return False
        trim()
        self._last = self.clock()
        return True
