"""The one way to talk to a remote model: teacher, judge or remote arm, over any OpenAI-compatible endpoint.

The official client does the wire; its own retries are switched off, because every attempt must pass the spend cap and the
cost record. A call that may have been charged (a time-out, an answer without usage) is recorded at its estimate: a cap
that counts only what is certain would not hold.
"""

from __future__ import annotations

import datetime
import email.utils
import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from giong.clients.reply_journal import ReplyJournal
from giong.clients.spend import SpendLedger
from giong.config.remote import EndpointConfig, RemoteModelConfig
from giong.contracts import FinishReason, Message, OnProgress, Reply, Request, Sampling
from giong.errors import ConfigError, TeacherError

RETRIED_STATUSES = frozenset({408, 409, 429})
BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 30.0
MAX_RETRY_AFTER_SECONDS = 60.0
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
# Fewer bytes per token than tokenizers reach on ordinary prose, so that an estimate errs on the dear side.
BYTES_PER_TOKEN = 3
POLL_SECONDS = 0.5
"""How often a long wait for answers looks up."""
# Settings that some servers refuse by name (reasoning models, for one); such a request is sent again without them.
OPTIONAL_SETTINGS = ("temperature", "top_p", "seed", "top_k", "repetition_penalty", "no_repeat_ngram_size")
UNSUPPORTED = re.compile(r"unsupported|not support|unrecogni[sz]ed|unknown|not permitted|extra (inputs|fields)", re.IGNORECASE)


T = TypeVar("T")


class RemoteModel:
    """A model behind an OpenAI-compatible API; a `Predictor`, and a teacher through `ask`.

    Raises ConfigError where the environment variable of the key is not set and the host is not this machine.
    `sleep` is called with seconds between attempts; where it returns true (as `threading.Event.wait` of a wish to stop does)
    no further attempt is made. With a `journal`, `predict` asks only what stands in none of its lines.
    """

    def __init__(
        self, config: RemoteModelConfig, ledger: SpendLedger, name: str | None = None, *,
        sleep: Callable[[float], object] = time.sleep, purpose: str = "", journal: ReplyJournal | None = None,
    ) -> None:  # fmt: skip
        import openai

        self.config = config
        self.name = name or config.model
        self.purpose = purpose or self.name
        self._ledger = ledger
        self._sleep = sleep
        self._journal = journal
        self._refused_settings: set[str] = set()
        self._lock = threading.Lock()
        self._client = openai.OpenAI(
            base_url=config.base_url, api_key=api_key(config), timeout=config.timeout_seconds, max_retries=0,
        )  # fmt: skip

    @property
    def refused_settings(self) -> frozenset[str]:
        """Sampling settings that the server does not know and that requests are therefore sent without."""
        with self._lock:
            return frozenset(self._refused_settings)

    def predict(self, requests: Sequence[Request], on_progress: OnProgress | None = None) -> list[Reply]:
        """Ask all, `config.concurrency` at once; replies in order. The first failure cancels what has not begun and is raised."""
        replies = [self._journal.find(request) if self._journal else None for request in requests]
        with asking_pool(self.config.concurrency, "remote") as pool:
            pending = {pool.submit(self._reply_to, request): index for index, request in enumerate(requests) if replies[index] is None}
            num_known = len(requests) - len(pending)
            count = on_progress and (lambda done, total: on_progress(num_known + done, num_known + total))
            for future in in_order_of_completion(pending, count):
                replies[pending[future]] = future.result()
        return [reply for reply in replies if reply is not None]

    def _reply_to(self, request: Request) -> Reply:
        reply = self.ask(request.messages, request.sampling or Sampling())
        if self._journal:
            self._journal.keep(request, reply)
        return reply

    def ask(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """One answer. Raises TeacherError after the retries (at once for 400, 401, 403, 404) and SpendCapReached before a call."""
        failed_attempts = 0
        while True:
            try:
                return self._attempt(messages, sampling)
            except _SettingRefused as refused:
                with self._lock:
                    self._refused_settings.add(refused.setting)
            except _Retryable as failure:
                failed_attempts += 1
                if failed_attempts > self.config.max_retries or self._sleep(_wait_seconds(failed_attempts, failure.retry_after_seconds)):
                    raise self._give_up(failure, failed_attempts) from failure.__cause__

    def _attempt(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        import openai

        num_prompt_tokens = sum(estimate_tokens(message.content) + 4 for message in messages)
        estimated_usd = self._cost_usd(num_prompt_tokens, sampling.max_new_tokens)
        settings = self._settings(sampling)
        self._ledger.reserve(estimated_usd)
        open_reservation_usd = estimated_usd
        started = time.monotonic()
        try:
            try:
                answer = self._client.chat.completions.create(
                    model=self.config.model, messages=[message.to_dict() for message in messages], **settings,
                )  # fmt: skip
            except openai.APITimeoutError as error:
                open_reservation_usd = 0.0
                self._record_estimate(num_prompt_tokens, sampling.max_new_tokens, estimated_usd)
                raise _Retryable(f"did not answer within {self.config.timeout_seconds:g} s", _TIMEOUT_REMEDY) from error
            except openai.APIConnectionError as error:
                raise _Retryable(f"cannot be reached ({error.__cause__ or error})", "Check base_url and that the server runs.") from error
            except openai.APIStatusError as error:
                self._refuse(error, settings)
            except (json.JSONDecodeError, UnicodeDecodeError, openai.APIResponseValidationError) as error:
                open_reservation_usd = 0.0
                self._record_estimate(num_prompt_tokens, 0, estimated_usd)
                raise _Retryable("answered with malformed JSON", PROTOCOL_REMEDY) from error
            open_reservation_usd = 0.0
            return self._settle(answer, num_prompt_tokens, estimated_usd, time.monotonic() - started)
        finally:
            if open_reservation_usd:
                self._ledger.release(open_reservation_usd)

    def _settings(self, sampling: Sampling) -> dict[str, Any]:
        """The request's settings: those away from neutral, less those that this server has refused."""
        settings: dict[str, Any] = {"temperature": sampling.temperature}
        if sampling.top_p != 1.0:
            settings["top_p"] = sampling.top_p
        if sampling.seed:
            settings["seed"] = sampling.seed
        # Not OpenAI's; giong's own server has all three, vLLM and llama.cpp the first two.
        neutral = {"top_k": 0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
        refused = self.refused_settings
        extra = {key: value for key in neutral if (value := getattr(sampling, key)) != neutral[key] and key not in refused}
        settings = {key: value for key, value in settings.items() if key not in refused}
        settings["max_completion_tokens" if "max_tokens" in refused else "max_tokens"] = sampling.max_new_tokens
        return {**settings, **({"extra_body": extra} if extra else {})}

    def _refuse(self, error: Any, settings: dict[str, Any]) -> NoReturn:
        """Turn an HTTP status into what follows from it: try again, try without a setting, or stop with one sentence."""
        status, said = error.status_code, server_message(error)
        if status in RETRIED_STATUSES or status >= 500:
            what = {429: "is limiting the rate of requests"}.get(status, "failed")
            raise _Retryable(f"{what} (HTTP {status}: {said})", _RATE_REMEDY, _retry_after_seconds(error.response.headers)) from error
        if status in (401, 403):
            raise self._error(
                f"refused the key in the environment variable {self.config.api_key_env} (HTTP {status}: {said})",
                f"Set {self.config.api_key_env} to a key that may use {self.config.model!r}.", permanent=True,
            ) from error  # fmt: skip
        if status in (400, 422) and (setting := self._named_setting(error, said, settings)):
            raise _SettingRefused(setting) from error
        remedy = "Check `model` and `base_url`." if status == 404 else "Change the request or the model as the server says."
        raise self._error(f"refused the request (HTTP {status}: {said})", remedy, permanent=status == 404) from error

    def _named_setting(self, error: Any, said: str, settings: dict[str, Any]) -> str | None:
        """The optional setting that a 400 complains about, if it was sent and can be done without."""
        if not UNSUPPORTED.search(said) and error.code != "unsupported_parameter":
            return None
        sent = {**settings, **settings.get("extra_body", {})}
        named = str(error.param or "")
        if "max_tokens" in sent and (named == "max_tokens" or "max_completion_tokens" in said):
            return "max_tokens"
        return next((key for key in OPTIONAL_SETTINGS if key in sent and (key == named or key in said)), None)

    def _settle(self, answer: Any, num_prompt_tokens: int, estimated_usd: float, seconds: float) -> Reply:
        """Record what the answer cost, then read it. Raises _Retryable where it has no text."""
        choices = getattr(answer, "choices", None)
        choice = choices[0] if isinstance(choices, list) and choices else None
        content = getattr(getattr(choice, "message", None), "content", None)
        text = content if isinstance(content, str) else ""
        usage = getattr(answer, "usage", None)
        prompt, completion = (getattr(usage, field, None) for field in ("prompt_tokens", "completion_tokens"))
        counted = isinstance(prompt, int) and isinstance(completion, int)
        if not counted:
            prompt, completion = num_prompt_tokens, estimate_tokens(text)
        cost_usd = self._cost_usd(prompt, completion)
        self._ledger.record(
            self.config.model, prompt, completion, cost_usd, self.purpose, reserved_usd=estimated_usd, estimated=not counted
        )
        if choices is None:
            raise _Retryable("answered with something that is no chat completion", PROTOCOL_REMEDY, answered=True)
        if choice is None:
            raise _Retryable("answered with an empty list of choices", PROTOCOL_REMEDY, answered=True)
        finish_reason: FinishReason = "length" if choice.finish_reason == "length" else "stop"
        if content is None and finish_reason == "stop":
            refusal = getattr(getattr(choice, "message", None), "refusal", None)
            raise _Retryable(f"refused: {refusal}" if refusal else "answered without content", _EMPTY_REMEDY, answered=True)
        if not text.strip() and finish_reason == "stop":
            raise _Retryable("answered with an empty text", _EMPTY_REMEDY, answered=True)
        return Reply(text, finish_reason, prompt, completion, seconds, cost_usd)

    def _record_estimate(self, num_prompt_tokens: int, num_completion_tokens: int, reserved_usd: float) -> None:
        self._ledger.record(
            self.config.model, num_prompt_tokens, num_completion_tokens, self._cost_usd(num_prompt_tokens, num_completion_tokens),
            self.purpose, reserved_usd=reserved_usd, estimated=True,
        )  # fmt: skip

    def _cost_usd(self, num_prompt_tokens: int, num_completion_tokens: int) -> float:
        prompt_usd = num_prompt_tokens * self.config.input_usd_per_million_tokens
        return (prompt_usd + num_completion_tokens * self.config.output_usd_per_million_tokens) / 1e6

    def _give_up(self, failure: _Retryable, num_attempts: int) -> TeacherError:
        times = "once" if num_attempts == 1 else f"{num_attempts} times"
        return self._error(f"{failure.what}, asked {times}", failure.remedy, answered=failure.answered)

    def _error(self, what: str, remedy: str, *, permanent: bool = False, answered: bool = False) -> TeacherError:
        error = TeacherError(f"The model {self.config.model!r} {what}", place=self.config.base_url, remedy=remedy)
        error.permanent, error.answered = permanent, answered
        return error


@contextmanager
def asking_pool(num_threads: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Threads that ask. At an error what has not begun is cancelled, and what is under way (and may be paid) is awaited.

    KeyboardInterrupt, the second Ctrl-C, awaits nothing.
    """
    pool = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix=name)
    try:
        yield pool
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()


def in_order_of_completion(futures: Iterable[Future[T]], on_progress: OnProgress | None) -> Iterator[Future[T]]:
    """The futures as they are done. `on_progress` is also called while nothing happens: it may carry a wish to stop."""
    pending = set(futures)
    total = len(pending)
    while pending:
        finished, pending = wait(pending, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        yield from finished
        if on_progress:
            on_progress(total - len(pending), total)


_TIMEOUT_REMEDY = "Raise timeout_seconds or lower concurrency, then run the same command again."
_RATE_REMEDY = "Lower concurrency or wait a little, then run the same command again; what was answered is kept."
PROTOCOL_REMEDY = "Check that base_url is an OpenAI-compatible API (it often ends in /v1)."
_EMPTY_REMEDY = "Try another model, or look at the passage that it was given."


class _Retryable(Exception):
    """An attempt failed in a way that another may not; never leaves this module."""

    def __init__(self, what: str, remedy: str, retry_after_seconds: float | None = None, *, answered: bool = False) -> None:
        super().__init__(what)
        self.answered = answered
        self.what = what
        self.remedy = remedy
        self.retry_after_seconds = retry_after_seconds


class _SettingRefused(Exception):
    """The server does not know a setting that the request can do without; never leaves this module."""

    def __init__(self, setting: str) -> None:
        super().__init__(setting)
        self.setting = setting


def estimate_tokens(text: str) -> int:
    """An upper estimate of the tokens of `text` from its UTF-8 bytes, for servers and moments that give no count."""
    return math.ceil(len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN)


def api_key(config: EndpointConfig) -> str:
    """The key; any where a server on this machine wants none. Raises ConfigError where it is missing."""
    key = os.environ.get(config.api_key_env, "").strip()
    if key:
        return key
    if urlsplit(config.base_url).hostname in LOOPBACK_HOSTS:
        return "local"
    raise ConfigError(
        f"The environment variable {config.api_key_env} is not set, and {config.model!r} needs a key",
        place=config.base_url, remedy=f"Run `export {config.api_key_env}=...`, or name another variable with api_key_env.",
    )  # fmt: skip


def server_message(error: Any) -> str:
    """What the server said, on one line; an HTML error page is cut short."""
    body = error.body
    said = body.get("message") if isinstance(body, dict) else None
    text = " ".join(str(said or error.response.text or "no message").split())
    return text if len(text) <= 300 else text[:297] + "..."


def _retry_after_seconds(headers: Any) -> float | None:
    """Seconds that a Retry-After header asks for (number or HTTP date), or None."""
    value = headers.get("retry-after")
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return max(0.0, (moment - datetime.datetime.now(datetime.UTC)).total_seconds())


def _wait_seconds(failed_attempts: int, retry_after_seconds: float | None) -> float:
    """Exponential back-off, less up to a quarter at random so that parallel requests do not return together."""
    if retry_after_seconds is not None and math.isfinite(retry_after_seconds):
        return min(retry_after_seconds, MAX_RETRY_AFTER_SECONDS)
    longest = min(BACKOFF_SECONDS * 2 ** (failed_attempts - 1), MAX_BACKOFF_SECONDS)
    return longest * (1 - 0.25 * random.random())
