"""OpenAI's fine-tuning API, at any base URL: files are uploaded, a job is made of them, its events are the figures of its training.

The official client does the wire and repeats what may be repeated. Making a job may not: the API knows no idempotency keys. So a job
carries a part of its key as its `suffix`, the one mark that even old servers give back, and is looked for by that first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

from giong.clients.openai_compatible import PROTOCOL_REMEDY, RETRIED_STATUSES, api_key, server_message
from giong.config.remote import RemoteTrainingConfig
from giong.contracts import Example, Message
from giong.errors import TeacherError
from giong.providers.contract import Job, JobResult, JobState, Metrics
from giong.sizing.prices import OPENAI_TRAINING_CLOSES
from giong.workspace import content_hash

SUFFIX = "giong-"
SUFFIX_KEY_LENGTH = 12
"""Hex digits of the key; with `SUFFIX` 18 characters, the most that Azure takes."""
PAGE = 100
MAX_EVENTS = 100_000
"""Where reading ends at a server whose list of events does not."""
ENDED = ("succeeded", "failed", "cancelled")
LOSSES = ("train_loss", "valid_loss", "full_valid_loss")


class OpenAIFineTuning:
    """A `Provider`."""

    min_examples = 10

    def __init__(self, config: RemoteTrainingConfig) -> None:
        import openai

        self.place = config.base_url
        self._config = config
        self._uploaded: dict[str, str] = {}
        self._client = openai.OpenAI(
            base_url=config.base_url, api_key=api_key(config), timeout=config.timeout_seconds, max_retries=config.max_retries,
        )  # fmt: skip

    def submit(self, job: Job) -> str:
        suffix = SUFFIX + job.key[:SUFFIX_KEY_LENGTH]
        if found := self._find(suffix):
            return found
        files = {"training_file": self._upload(job.examples), "validation_file": self._upload(job.validation)}
        given = {"batch_size": job.batch_size, "learning_rate_multiplier": job.learning_rate_multiplier}
        hyperparameters: Any = {"n_epochs": job.n_epochs, **{name: value for name, value in given.items() if value is not None}}
        with self._explained("a new job", unsure="Run the same command again: if the job was made, it is found."):
            made = self._client.with_options(max_retries=0).fine_tuning.jobs.create(
                model=job.model, seed=job.seed, suffix=suffix, method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
                **files,
            )  # fmt: skip
            return self._id_of(made)

    def poll(self, job_id: str) -> JobState:
        with self._explained(f"the state of {job_id}"):
            job = self._client.fine_tuning.jobs.retrieve(job_id)
            self._id_of(job)
        error = job.error
        return JobState(job.status if job.status in ENDED else "running", (error and (error.message or error.code)) or "")

    def result(self, job_id: str) -> JobResult:
        with self._explained(f"the result of {job_id}"):
            job = self._client.fine_tuning.jobs.retrieve(job_id)
            by_step: dict[int, dict[str, float]] = {}
            for event in islice(self._client.fine_tuning.jobs.list_events(job_id, limit=PAGE), MAX_EVENTS):
                if event.type == "metrics" and isinstance(event.data, dict):
                    _collect(by_step, event.data.get("step"), event.data)
            if not any("full_valid_loss" in losses for losses in by_step.values()):
                # Some servers keep the loss of the whole validation file with the checkpoints alone.
                for checkpoint in islice(self._client.fine_tuning.jobs.checkpoints.list(job_id, limit=PAGE), MAX_EVENTS):
                    _collect(by_step, checkpoint.step_number, checkpoint.metrics.to_dict() if checkpoint.metrics else {})
        return JobResult(job.fine_tuned_model, job.trained_tokens, tuple(Metrics(step, **by_step[step]) for step in sorted(by_step)))

    def cancel(self, job_id: str) -> None:
        with self._explained(f"the end of {job_id}"):
            self._client.fine_tuning.jobs.cancel(job_id)

    def _find(self, suffix: str) -> str | None:
        """The id of a job with that suffix among the latest ones that did not end badly."""
        with self._explained("the list of jobs"):
            page = self._client.fine_tuning.jobs.list(limit=PAGE)
            alive = [job for job in getattr(page, "data", None) or () if job.status not in ("failed", "cancelled")]
        return next((job.id for job in alive if getattr(job, "user_provided_suffix", None) == suffix), None)

    def _upload(self, examples: Sequence[Example]) -> str:
        """The id of a file with these rows, uploaded once."""
        content = "".join(json.dumps(chat_row(example), ensure_ascii=False) + "\n" for example in examples).encode()
        key = content_hash(content)
        if key not in self._uploaded:
            with self._explained("a file of rows"):
                made = self._id_of(self._client.files.create(file=(f"giong-{key}.jsonl", content), purpose="fine-tune"))
                file = self._client.files.wait_for_processing(made)
            if file.status == "error":
                raise self._error(f"refused the rows: {file.status_details or 'no reason given'}", "Change the rows as it says.")
            self._uploaded[key] = made
        return self._uploaded[key]

    def _id_of(self, made: Any) -> str:
        if not isinstance(getattr(made, "id", None), str):
            raise self._error("answered with something that has no id", PROTOCOL_REMEDY)
        return made.id

    @contextmanager
    def _explained(self, what: str, unsure: str = "Run the same command again; jobs that were submitted go on.") -> Iterator[None]:
        """Turn the client's errors into one sentence. `unsure` is the remedy where nobody knows what became of the request."""
        import openai

        try:
            yield
        except openai.APITimeoutError as error:
            raise self._error(f"did not answer within {self._config.timeout_seconds:g} s (asked for {what})", unsure) from error
        except openai.APIConnectionError as error:
            raise self._error(f"cannot be reached (asked for {what}: {error.__cause__ or error})", f"Check base_url. {unsure}") from error
        except openai.APIStatusError as error:
            said = f"refused {what} (HTTP {error.status_code}: {server_message(error)})"
            raise self._error(said, self._remedy(error, unsure), permanent=not _may_pass(error)) from error
        except (json.JSONDecodeError, UnicodeDecodeError, openai.APIResponseValidationError) as error:
            raise self._error(f"answered with malformed JSON (asked for {what})", PROTOCOL_REMEDY) from error
        except TeacherError:
            raise
        except RuntimeError as error:
            # The client's own: a file that is never processed.
            raise self._error(f"did not give {what}: {error}", unsure) from error

    def _remedy(self, error: Any, unsure: str) -> str:
        if _may_pass(error):
            return f"Wait a little. {unsure}"
        closed = ""
        if urlsplit(self.place).hostname == "api.openai.com":
            closed = f" OpenAI itself takes jobs from its former customers only, and from nobody from {OPENAI_TRAINING_CLOSES} on."
        if error.status_code in (401, 403):
            return f"Set {self._config.api_key_env} to a key that may train {self._config.model!r}.{closed}"
        if error.status_code == 404:
            return f"Check `model` and `base_url`.{closed}"
        return "Change the settings or the rows as it says."

    def _error(self, what: str, remedy: str, *, permanent: bool = False) -> TeacherError:
        error = TeacherError(f"The provider of {self._config.model!r} {what}", place=self.place, remedy=remedy)
        error.permanent = permanent
        return error


def _may_pass(error: Any) -> bool:
    return error.status_code in RETRIED_STATUSES or error.status_code >= 500


def chat_row(example: Example) -> dict[str, Any]:
    """An example as a line of a chat file in OpenAI's fine-tuning format."""
    row: dict[str, Any] = {"messages": [_chat_message(message) for message in example.conversation]}
    return {**row, "tools": list(example.tools)} if example.tools else row


def _chat_message(message: Message) -> dict[str, Any]:
    made = message.to_dict()
    if calls := made.get("tool_calls"):
        # Kept as objects here, because chat templates expect them; on the wire they are a text of JSON.
        made["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
            for call in calls
        ]
    return {**made, "weight": 0} if message.role == "assistant" and not message.weight else made


def _collect(by_step: dict[int, dict[str, float]], step: Any, figures: dict[str, Any]) -> None:
    if isinstance(step, int):
        losses = {name: float(figures[name]) for name in LOSSES if isinstance(figures.get(name), int | float)}
        # The newest come first, and stand.
        by_step[step] = {**losses, **by_step.get(step, {})}
