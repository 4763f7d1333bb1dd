"""What a provider of remote fine-tuning does, whoever it is: a job is submitted, asked about, read at its end, or cancelled.

One decision a reader may question: a job is named by its content, and `submit` looks for one of that name before it makes another. These
APIs know no idempotency keys, and a job that a kill (or a lost answer) left unrecorded here would otherwise be paid for twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

from giong.config.remote import RemoteTrainingConfig
from giong.contracts import Example
from giong.errors import TeacherError
from giong.workspace import content_hash

JobStatus = Literal["running", "succeeded", "failed", "cancelled"]
"""`running` from the moment it is submitted, whatever the provider calls the time before and in between."""

FIRST_POLL_SECONDS, POLL_GROWTH, MAX_POLL_SECONDS = 2.0, 1.5, 60.0
MAX_FAILED_POLLS = 20
"""In a row: about twenty minutes in which nobody answers, once questions are a minute apart."""


@dataclass(frozen=True)
class Job:
    """A supervised training on chats. An assistant's turn of weight 0 carries no loss; None leaves a setting to the provider."""

    model: str
    examples: Sequence[Example]
    validation: Sequence[Example]
    n_epochs: int
    seed: int
    batch_size: int | None = None
    learning_rate_multiplier: float | None = None

    @cached_property
    def key(self) -> str:
        """Names the job by all of its content."""
        return content_hash(self)


@dataclass(frozen=True, slots=True)
class JobState:
    """`reason` is the provider's own sentence, where a job did not succeed."""

    status: JobStatus
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Metrics:
    """Losses after a step, nats per token: of its rows, of some of the validation rows, of all of them. None: not reported."""

    step: int
    train_loss: float | None = None
    valid_loss: float | None = None
    full_valid_loss: float | None = None


@dataclass(frozen=True, slots=True)
class JobResult:
    """What an ended job leaves: the tuned model's name there, the tokens that are charged (all epochs; None: not said), its metrics by step."""

    model: str | None
    num_tokens: int | None
    metrics: Sequence[Metrics]

    def last(self, figure: Literal["train_loss", "valid_loss", "full_valid_loss"]) -> float | None:
        """A figure's value at the last step that has one; None where none is a number."""
        values = [value for row in self.metrics if (value := getattr(row, figure)) is not None]
        return values[-1] if values and math.isfinite(values[-1]) else None


class Provider(Protocol):
    """A place that trains. Every call raises TeacherError, with what the provider said and what to do, where it is refused or unreachable;
    it is `permanent` where the same call would fail again."""

    place: str
    """Its address, as messages name it."""
    min_examples: int
    """A job with fewer is refused there."""

    def __init__(self, config: RemoteTrainingConfig) -> None:
        """Raises ConfigError where the key is missing; sends nothing."""

    def submit(self, job: Job) -> str:
        """The id of the job, made now, or earlier with the same content (unless that one failed or was cancelled)."""

    def poll(self, job_id: str) -> JobState:
        """How it stands."""

    def result(self, job_id: str) -> JobResult:
        """What it left, however it ended."""

    def cancel(self, job_id: str) -> None:
        """Stop it. What it has done until then may be charged."""


def outcomes(
    provider: Provider, job_ids: Sequence[str], *, sleep: Callable[[float], object], max_wait_seconds: float = math.inf
) -> Iterator[tuple[str, JobState]]:
    """Each job with its state, as it ends. The time between two questions grows from 2 s to 60 s, and a few without an answer are borne.

    Whatever `sleep` (called with seconds) raises ends the wait, and TeacherError does after `max_wait_seconds`; the jobs go on.
    """
    pending, waited, interval, num_failed = list(job_ids), 0.0, FIRST_POLL_SECONDS, 0
    while True:
        for job_id in tuple(pending):
            try:
                state = provider.poll(job_id)
            except TeacherError as error:
                num_failed += 1
                if error.permanent or num_failed > MAX_FAILED_POLLS:
                    raise
                break
            num_failed = 0
            if state.status != "running":
                pending.remove(job_id)
                yield job_id, state
        if not pending:
            return
        if waited >= max_wait_seconds:
            raise TeacherError(
                f"{', '.join(pending)} had not ended after {max_wait_seconds:g} s", place=provider.place,
                remedy="They go on: the same command waits for them again and pays nothing twice. Raise max_wait_seconds to wait longer.",
            )  # fmt: skip
        sleep(interval)
        waited += interval
        interval = min(interval * POLL_GROWTH, MAX_POLL_SECONDS)
