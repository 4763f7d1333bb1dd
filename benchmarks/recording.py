"""What every measured process does alike: read its job, time its steps, note its peak memory, write what it found.

Standard library and numpy only (torch where the process has it): giong's process and the peers' both import this file.
A step's time runs from the end of the step before to its own end, so nothing between steps goes uncounted.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shapes import RowMix


@dataclass(frozen=True, slots=True)
class Job:
    """What one process is to train and how it is to be measured. `settings` are those of its arm."""

    model: str
    vocab_size: int
    method: str
    lora_r: int
    mix: RowMix
    device: str
    max_tokens_per_pack: int
    num_warmup_steps: int
    num_steps: int
    dtype: str = "bfloat16"
    settings: dict[str, Any] = field(default_factory=dict)
    matrix_rate: bool = False
    profile: bool = False

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Job:
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, "mix": RowMix(**values["mix"])})


def job_and_result() -> tuple[Job, Path]:
    """The two arguments of a measured process: the job's file, and where its figures go."""
    return Job.read(Path(sys.argv[1])), Path(sys.argv[2])


class StepRecorder:
    """Notes the end of every optimizer step; after the last measured one, the peak memory up to then."""

    def __init__(self, job: Job, clock: Callable[[], float] = time.perf_counter) -> None:
        if job.num_warmup_steps < 1:
            raise ValueError("the first step pays for allocation and compilation: at least one step of warm-up")
        self.job = job
        self.clock = clock
        self.ends: list[float] = []
        self.num_tokens: list[int] = []
        self.losses: list[float | None] = []
        self.grad_norms: list[float | None] = []
        self.num_loss_tokens: int | None = None
        self.faults = [0, 0]
        self.peak_memory_bytes = 0
        self.started = clock()

    def step(self, num_tokens: int, loss: float | None = None, grad_norm: float | None = None) -> None:
        """Call at the end of each step; steps after the last measured one are ignored."""
        number = len(self.ends) + 1
        if number > self.job.num_warmup_steps + self.job.num_steps:
            return
        if number in (self.job.num_warmup_steps, self.job.num_warmup_steps + self.job.num_steps):
            _finish_device_work(self.job.device)
            self.faults[number > self.job.num_warmup_steps] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        self.ends.append(self.clock())
        self.num_tokens.append(num_tokens)
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)
        if self.is_finished:
            self.peak_memory_bytes = peak_memory_bytes(self.job.device)

    @property
    def is_finished(self) -> bool:
        return len(self.ends) == self.job.num_warmup_steps + self.job.num_steps

    def figures(self) -> dict[str, Any]:
        """Tokens per second over the measured steps (all their tokens by all their time), peak memory, and what checks need."""
        if not self.is_finished:
            raise RuntimeError(f"only {len(self.ends)} of {self.job.num_warmup_steps + self.job.num_steps} steps were made")
        warm = self.job.num_warmup_steps
        seconds = self.ends[-1] - self.ends[warm - 1]
        return {
            "tokens_per_second": sum(self.num_tokens[warm:]) / seconds,
            "seconds": seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "num_tokens_per_step": self.num_tokens[0],
            "num_loss_tokens_per_step": self.num_loss_tokens,
            "first_loss": self.losses[0],
            "first_grad_norm": self.grad_norms[0],
            "last_loss": self.losses[-1],
            "first_step_seconds": self.ends[0] - self.started,
            "step_seconds": [end - start for start, end in zip(self.ends[warm - 1 :], self.ends[warm:])],
            "page_faults_per_step": (self.faults[1] - self.faults[0]) / self.job.num_steps,
        }


def _finish_device_work(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def peak_memory_bytes(device: str) -> int:
    """CPU: the whole process's peak resident memory. CUDA: the peak of what torch allocated."""
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_figures(path: Path, figures: dict[str, Any]) -> None:
    path.write_text(json.dumps(figures), encoding="utf-8")
