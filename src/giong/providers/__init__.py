"""Remote fine-tuning: one file per API, one contract (`contract.py`), one explicit table."""

from giong.providers.contract import Job, JobResult, JobState, Metrics, Provider, outcomes
from giong.providers.job_journal import JobJournal, Submitted
from giong.providers.openai import OpenAIFineTuning

__all__ = ["PROVIDERS", "Job", "JobJournal", "JobResult", "JobState", "Metrics", "Provider", "Submitted", "outcomes"]

PROVIDERS: dict[str, type[Provider]] = {"openai": OpenAIFineTuning}
"""`provider` of the settings -> its class. A new API is one file and one line here."""
