"""Pilots at a provider of fine-tuning (`sizing.pilot_remote`): the slices as jobs, and the validation losses that come back.

One decision a reader may question: one job more is paid for, on ten rows with next to no learning rate. Its loss is the untuned model's,
measured by the same code on the same rows as every other; what providers report of the first steps is not (docs/decisions/0017-remote-pilots.md).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from giong.clients.openai_compatible import estimate_tokens
from giong.contracts import Event, Example
from giong.errors import DataError, TeacherError
from giong.providers import PROVIDERS, Job, JobJournal, JobResult, JobState, Provider, Submitted, outcomes
from giong.sizing.learning_curve import CurvePoint
from giong.sizing.units import format_usd
from giong.workflow.story import Story
from giong.workflow.training import Run

NEXT_TO_NOTHING = 1e-6
"""Factor on the provider's learning rate at which nothing is learnt: it has to be above 0."""
WHOLE, PART = "full_valid_loss", "valid_loss"
LOOK_UP_SECONDS = 0.5
"""How often a long wait asks whether to stop."""


class RemotePilots:
    """The jobs for `runs`, which are trained nowhere else. Raises DataError where a slice is too small for the provider."""

    def __init__(self, story: Story, runs: Sequence[Run]) -> None:
        config = story.config.sizing.pilot_remote
        assert config is not None
        self._story, self._config, self._runs = story, config, runs
        least = PROVIDERS[config.provider].min_examples
        if (smallest := min(len(run.examples) for run in runs)) < least:
            raise DataError(
                f"A pilot of {smallest} rows is too small for {config.base_url}, which takes {least} or more",
                place="sizing.pilot_shares", remedy="Raise the smallest share, or add more writing.",
            )  # fmt: skip
        last_alone = story.config.objective.loss_on == "last_answer"
        validation = tuple(map(_last_answer_alone, story.test_examples))
        pilots = [
            Job(
                config.model, tuple(map(_last_answer_alone, run.examples) if last_alone else run.examples), validation, config.n_epochs,
                run.record["settings"]["train"]["seed"], config.batch_size, config.learning_rate_multiplier,
            )
            for run in runs
        ]  # fmt: skip
        untuned = replace(pilots[0], examples=pilots[0].examples[:least], n_epochs=1, learning_rate_multiplier=NEXT_TO_NOTHING)
        self._jobs = [untuned, *pilots]
        self._journal = JobJournal(story.project.data / "jobs.jsonl", config.base_url)

    @property
    def sibling(self) -> str:
        """What the curve is carried over from."""
        return f"{self._config.model} at {self._config.base_url}"

    @property
    def keys(self) -> list[str]:
        return [self._config.base_url, *(job.key for job in self._jobs)]

    @property
    def usd(self) -> float:
        """What all jobs have cost."""
        return sum(found.usd for job in self._jobs if (found := self._journal.find(job)))

    @cached_property
    def _provider(self) -> Provider:
        return PROVIDERS[self._config.provider](self._config)

    def submit(self) -> None:
        """Say what the missing jobs cost, and submit them. Raises SpendCapReached before the first where they do not fit the budget."""
        # By content: two shares may come to the same rows.
        missing = list({job.key: job for job in self._jobs if self._journal.find(job) is None}.values())
        if not missing:
            return
        ledger, tokens = self._story.ledger, [_num_tokens(job) for job in missing]
        self._story.notice(
            "size",
            f"{len(missing)} training{'s' if len(missing) > 1 else ''} of {self.sibling}, which is sent {len(self._runs[-1].examples)} training rows and "
            f"{len(self._story.test_examples)} test requests: at most {sum(tokens):,} tokens, {format_usd(self._usd(sum(tokens)))}; "
            f"spent so far {format_usd(ledger.spent_usd)} of {format_usd(ledger.max_usd)}",
        )
        left_usd = self._usd(sum(tokens))
        ledger.reserve(left_usd)
        try:
            for job, num_tokens in zip(missing, tokens):
                self._story.check_stop()
                usd, job_id = self._usd(num_tokens), self._provider.submit(job)
                # The money before the job's id: a kill in between counts it twice, and not never.
                left_usd -= usd
                ledger.record(job.model, num_tokens, 0, usd, "pilots", reserved_usd=usd, estimated=True)
                self._journal.submitted(job, Submitted(job_id, num_tokens, usd))
        finally:
            ledger.release(left_usd)

    def measured(self) -> tuple[list[CurvePoint], dict[str, float], bool]:
        """Wait for all jobs: the pilots, the untuned loss (nats per token, under one name for all documents), and whether the losses are of
        a part of the test requests. Raises TeacherError for a job that failed or reports no validation loss; the others are kept."""
        waiting = {found.job_id: job for job in self._jobs if (found := self._journal.find(job)) and found.result is None}
        for job_id, state in outcomes(self._provider, list(waiting), sleep=self._sleep, max_wait_seconds=self._config.max_wait_seconds):
            self._settle(waiting[job_id], job_id, state)
        results = [self._result_of(job) for job in self._jobs]
        for figure in (WHOLE, PART):
            losses = [result.last(figure) for result in results]
            if None not in losses:
                untuned, *pilots = [{"validation": loss} for loss in losses]
                points = [CurvePoint(len(job.examples), loss, job.seed) for job, loss in zip(self._jobs[1:], pilots)]
                return points, untuned, figure == PART
        raise TeacherError(
            f"The provider reports no validation loss of the {self._name(self._jobs[losses.index(None)])}, and a learning curve is made of those",
            place=self._config.base_url, remedy="Train the pilots here (sizing.pilot_model), or at a provider that reports them.",
        )  # fmt: skip

    def _settle(self, job: Job, job_id: str, state: JobState) -> None:
        """Write down how a job ended and what it came to. Raises TeacherError where it did not succeed."""
        result, before = self._provider.result(job_id), self._journal.find(job)
        assert before is not None
        num_tokens = before.num_tokens if result.num_tokens is None else result.num_tokens
        if state.status == "failed" and result.num_tokens is None and not result.metrics:
            # It never took a step.
            num_tokens = 0
        usd = before.usd * num_tokens / before.num_tokens
        if state.status == "succeeded":
            self._journal.succeeded(job, result, num_tokens, usd)
        else:
            self._journal.ended_badly(job, state)
        if num_tokens != before.num_tokens:
            # What was recorded at the start was an estimate.
            self._story.ledger.record(job.model, num_tokens - before.num_tokens, 0, usd - before.usd, "pilots")
        if state.status != "succeeded":
            ended, said = "failed" if state.status == "failed" else "was cancelled", f": {state.reason}" if state.reason else ""
            raise TeacherError(
                f"The {self._name(job)} ({job_id}) {ended}{said}", place=self._config.base_url,
                remedy="See to that and run `giong size` again: this job alone is submitted again, the others are kept.",
            )  # fmt: skip
        self._story.notice("size", f"the {self._name(job)} ({job_id}) has ended, {format_usd(usd)}")

    def _name(self, job: Job) -> str:
        return "untuned job" if job is self._jobs[0] else f"pilot on {len(job.examples)} rows"

    def _result_of(self, job: Job) -> JobResult:
        found = self._journal.find(job)
        assert found is not None and found.result is not None
        return found.result

    def _usd(self, num_tokens: int) -> float:
        return num_tokens * self._config.training_usd_per_million_tokens / 1e6

    def _sleep(self, seconds: float) -> None:
        ended = sum(bool((found := self._journal.find(job)) and found.result) for job in self._jobs)
        self._story.emit(Event("progress", "size", data={"done": ended, "total": len(self._jobs), "unit": "jobs"}))
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._story.check_stop()
            time.sleep(min(left, LOOK_UP_SECONDS))


def _last_answer_alone(example: Example) -> Example:
    """The same with no loss on earlier turns of the assistant."""
    *before, last = example.conversation
    silent = tuple(replace(message, weight=0.0) if message.role == "assistant" else message for message in before)
    return replace(example, messages=silent if example.answer else (*silent, last))


def _num_tokens(job: Job) -> int:
    """Training tokens of a job, all epochs: an upper estimate from the bytes of its turns and tools as JSON."""
    rows = ([*(message.to_dict() for message in example.conversation), *example.tools] for example in job.examples)
    return job.n_epochs * sum(estimate_tokens(json.dumps(row, ensure_ascii=False)) for row in rows)
