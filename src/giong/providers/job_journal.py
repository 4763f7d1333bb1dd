"""Which jobs were submitted and how they ended, as an append-only JSONL file: a killed run asks about its jobs and pays for none again.

A job is found by its content and the address that it was sent to, so that a changed slice or setting is a new job. One that failed or
was cancelled is forgotten when its end is written down: asked for again, it is submitted again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from giong.errors import DataError
from giong.providers.contract import Job, JobResult, JobState, JobStatus, Metrics
from giong.workspace import append_jsonl, mend_torn_end, read_jsonl


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job at a provider: its training tokens (all epochs) and cost, estimated until it has ended; `result` once it succeeded."""

    job_id: str
    num_tokens: int
    usd: float
    result: JobResult | None = None


class JobJournal:
    """The jobs of a project at one address. Raises DataError naming a line that is none of this journal's."""

    def __init__(self, path: Path, place: str) -> None:
        self.path, self.place = path, place
        self._jobs: dict[tuple[str, str], Submitted] = {}
        if path.is_file():
            mend_torn_end(path)
            for number, row in enumerate(read_jsonl(path), start=1):
                try:
                    name = (row["place"], row["key"])
                    if row["status"] in ("failed", "cancelled"):
                        self._jobs.pop(name, None)
                    else:
                        self._jobs[name] = _submitted(**row["job"])
                except (KeyError, TypeError):
                    raise DataError("Not a line of the job journal", place=f"{path}:{number}", remedy="Mend or delete that line.") from None

    def find(self, job: Job) -> Submitted | None:
        """The job as it was submitted before; None where it was not, or did not succeed."""
        return self._jobs.get((self.place, job.key))

    def submitted(self, job: Job, submitted: Submitted) -> None:
        """Write it down before it is waited for."""
        self._write(job, submitted, "running")

    def succeeded(self, job: Job, result: JobResult, num_tokens: int, usd: float) -> None:
        """Write its result down, with what it came to."""
        self._write(job, replace(self._jobs[self.place, job.key], result=result, num_tokens=num_tokens, usd=usd), "succeeded")

    def ended_badly(self, job: Job, state: JobState) -> None:
        """Write down that it failed or was cancelled, and forget it."""
        self._write(job, self._jobs[self.place, job.key], state.status, state.reason)
        del self._jobs[self.place, job.key]

    def _write(self, job: Job, submitted: Submitted, status: JobStatus, reason: str = "") -> None:
        self._jobs[self.place, job.key] = submitted
        append_jsonl(self.path, {"key": job.key, "place": self.place, "status": status, "reason": reason, "job": submitted})


def _submitted(job_id: str, num_tokens: int, usd: float, result: dict | None) -> Submitted:
    found = result and JobResult(**{**result, "metrics": tuple(Metrics(**row) for row in result["metrics"])})
    return Submitted(job_id, num_tokens, usd, found)
