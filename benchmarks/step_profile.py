"""Where a training step's time goes: torch.profiler's own-time per operation, summed into a few groups.

Groups are made by the names of the operation and of what called it, so they hold for any engine. What no operation accounts
for (Python, autograd's own work, compiled regions without names) is "rest".
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

GROUPS = (
    "matrix products", "attention forward", "attention backward", "element-wise forward", "element-wise backward", "copies", "optimizer",
    "rest",
)  # fmt: skip

_ATTENTION = re.compile(r"attention|\bbmm\b|baddbmm|flash|flex", re.IGNORECASE)
_MATRIX = re.compile(r"\b(mm|addmm\w*|linear|mkldnn_linear|matmul|_linear_pointwise|_int_mm|_scaled_mm|addmv|mv)\b|gemm|cutlass")
_OPTIMIZER = re.compile(r"_fused_adam|_foreach_|optimizer\.step|newton_schulz", re.IGNORECASE)
_COPIES = re.compile(
    r"\b(copy_|_to_copy|to|clone|contiguous|_?cat|stack|index_select|index|index_put_|index_copy_|index_add_|gather|scatter\w*|embedding\w*|"
    r"slice_backward|select_backward|repeat|repeat_interleave|fill_|zero_|zeros\w*|full\w*|nonzero|arange)\b|mem(cpy|set)",
    re.IGNORECASE,
)
# Views and questions move no data: their time is the cost of calling them.
_VIEWS = re.compile(
    r"\b(_?\w*view\w*|_?reshape\w*|transpose|t|permute|(un)?squeeze|as_strided|slice|select|narrow|split\w*|unbind|chunk|expand\w*|"
    r"unflatten|flatten|detach_?|alias|empty\w*|new_\w+|resize_|item|_local_scalar_dense|is_nonzero|result_type)\b"
)
_ARITHMETIC = re.compile(r"^[a-z_]\w*::|^triton_|^graph_\d+|fused|elementwise|reduce|softmax")


def group_of(name: str, callers: Sequence[str] = ()) -> str:
    """The group of an operation (or device kernel) that was called by `callers`.

    A batched product is attention's, since nothing else in a decoder is written as one, and so is all that runs inside a
    function with attention in its name.
    """
    around = (name, *callers)
    if any(_OPTIMIZER.search(one) for one in around):
        return "optimizer"
    backward = any(one.startswith("autograd::engine") or "backward" in one.lower() for one in around)
    if any(_ATTENTION.search(one) for one in around if not one.startswith("autograd::")):
        return "attention backward" if backward else "attention forward"
    short = name.rpartition("::")[2]
    if name.startswith("autograd::") or _VIEWS.search(short):
        return "rest"
    if _MATRIX.search(short):
        return "matrix products"
    if _COPIES.search(short):
        return "copies"
    if _ARITHMETIC.search(name):
        return "element-wise backward" if backward else "element-wise forward"
    return "rest"


BUSY_SHARE = 0.2
"""Of a step, from which on a thread counts as one that computes passes."""


class StepProfile:
    """Profiles what runs between `start` and `stop`; `groups` are seconds per group."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.groups: dict[str, float] = {}
        self.largest: list[tuple[str, float, int]] = []
        self.seconds = 0.0
        self._profiler: Any = None

    def start(self) -> None:
        from torch.profiler import ProfilerActivity, _ExperimentalConfig, profile

        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.device != "cpu" else [])
        # Passes side by side run in threads of their own.
        self._profiler = profile(activities=activities, experimental_config=_ExperimentalConfig(profile_all_threads=True))
        self._profiler.__enter__()
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Ends a running profile; nothing where none runs."""
        if self._profiler is None:
            return
        self.seconds = time.perf_counter() - self._started
        self._profiler.__exit__(None, None, None)
        self._sum(self._profiler.events())
        self._profiler = None

    def _sum(self, events: Any) -> None:
        on_device = self.device != "cpu"
        groups, by_name, calls, of_thread = Counter[str](), Counter[str](), Counter[str](), Counter[int]()
        for event in events:
            microseconds = event.self_device_time_total if on_device else event.self_cpu_time_total
            if microseconds <= 0:
                continue
            groups[group_of(event.name, _callers(event))] += microseconds * 1e-6
            by_name[event.name] += microseconds * 1e-6
            calls[event.name] += 1
            of_thread[event.thread] += microseconds * 1e-6
        # Where the device is the CPU, time that belongs to no operation is Python's, or one thread's that waits for another; on a GPU it
        # is the GPU's idle time.
        lanes = 1 if on_device else max(1, sum(seconds > BUSY_SHARE * self.seconds for seconds in of_thread.values()))
        groups["rest"] += max(0.0, lanes * self.seconds - sum(groups.values()))
        self.groups = {group: groups[group] for group in GROUPS}
        self.largest = [(name, seconds, calls[name]) for name, seconds in by_name.most_common(25)]

    def result(self) -> dict[str, Any]:
        """Seconds and shares per group, and the 25 largest operations."""
        total = sum(self.groups.values())
        return {
            "step_seconds": self.seconds,
            "seconds": self.groups,
            "shares": {group: seconds / total for group, seconds in self.groups.items()},
            "largest": [{"name": name, "seconds": seconds, "calls": calls} for name, seconds, calls in self.largest],
        }


def _callers(event: Any) -> list[str]:
    names, parent = [], event.cpu_parent
    while parent is not None:
        names.append(parent.name)
        parent = parent.cpu_parent
    return names
