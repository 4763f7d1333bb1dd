"""OpenAI's wire format, once: what a chat request may hold, and the objects and chunks that answer it.

Unknown fields are ignored, as the official service's clients send more every year. Known ones that would change the answer
and cannot be honoured here are refused by name: silence would look like success.
"""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from giong.server.errors import ApiError

MAX_CHOICES = 8
MAX_TEXTS = 2048
"""Of one request for embeddings or labels: OpenAI's own limit."""
SYSTEM_ROLES = {"developer": "system"}
REFUSED = (
    "logprobs", "top_logprobs", "tools", "functions", "logit_bias", "audio", "web_search_options", "frequency_penalty", "presence_penalty",
)  # fmt: skip
"""Fields that are accepted only when they are empty, 0 or false."""
DONE = b"data: [DONE]\n\n"


def _whole_characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair (\\ud800 to \\udfff) is not a character") from None
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]
"""JSON can spell halves of characters that no text can hold."""


class WireMessage(BaseModel):
    """A message; its content is a text or a list of text parts."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: Text

    @field_validator("role", mode="before")
    @classmethod
    def _no_tools(cls, value: Any) -> Any:
        if value in ("tool", "function"):
            raise ValueError(f"the role {value!r} belongs to tools, which are not supported here")
        return value

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise ValueError(f"only parts of type 'text' are supported here, not {kind!r}")
        return "".join(part["text"] for part in value)

    def to_protocol(self) -> dict[str, str]:
        return {"role": SYSTEM_ROLES.get(self.role, self.role), "content": self.content}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: bool | None = None


class TextsRequest(BaseModel):
    """The body of POST /v1/embeddings and /v1/classify."""

    model_config = ConfigDict(extra="ignore")

    model: Text = Field(min_length=1)
    input: list[Text] = Field(min_length=1, max_length=MAX_TEXTS)
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list) and texts and not any(isinstance(text, str) for text in texts):
            raise ValueError("only texts are taken here, not token ids")
        if isinstance(texts, list) and "" in texts:
            raise ValueError("an empty text has no meaning")
        return texts

    @field_validator("encoding_format", mode="before")
    @classmethod
    def _null_is_float(cls, value: Any) -> Any:
        return "float" if value is None else value


class ChatRequest(BaseModel):
    """The body of POST /v1/chat/completions. `top_k`, `repetition_penalty` and `no_repeat_ngram_size` are additions."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: Text = Field(min_length=1)
    messages: list[WireMessage] = Field(min_length=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=2**31)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    no_repeat_ngram_size: int | None = Field(default=None, ge=0, le=2**31)
    max_tokens: int | None = Field(default=None, ge=1, le=2**31)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31)
    stop: list[Text] = []
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_list(cls, value: Any) -> Any:
        stop = [] if value is None else [value] if isinstance(value, str) else value
        if isinstance(stop, list) and (len(stop) > 4 or "" in stop):
            raise ValueError("at most four stop texts, none of them empty")
        return stop

    @field_validator("n", "stream", mode="before")
    @classmethod
    def _null_is_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def refuse_unsupported(self) -> None:
        """Raises ApiError (400) naming the first field that would have to be honoured and cannot be."""
        extra = self.model_extra or {}
        for name in REFUSED:
            if extra.get(name):
                only = "only 0 is accepted" if "penalty" in name else "it is not supported here"
                raise ApiError(
                    f"{name} cannot be {_short(extra[name])}: {only}", param=name, code="unsupported_parameter", remedy="Leave it out."
                )
        wanted = extra.get("response_format")
        if wanted and (not isinstance(wanted, dict) or wanted.get("type", "text") != "text"):
            raise ApiError("Only response_format of type 'text' is supported here", param="response_format", code="unsupported_parameter")
        modalities = extra.get("modalities")
        if modalities and modalities != ["text"]:
            raise ApiError("Only the modality 'text' is supported here", param="modalities", code="unsupported_parameter")

    def calls(self) -> list[dict[str, Any]]:
        """The protocol's chat, once per choice; each choice draws from a seed of its own."""
        sampling = {
            "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "repetition_penalty": self.repetition_penalty,
            "no_repeat_ngram_size": self.no_repeat_ngram_size, "max_new_tokens": self.max_completion_tokens or self.max_tokens,
            "seed": self.seed,
        }  # fmt: skip
        if self.n > 1 and self.seed is None:
            sampling["seed"] = secrets.randbits(62)
        sampling = {name: value for name, value in sampling.items() if value is not None}
        messages = [message.to_protocol() for message in self.messages]
        return [
            {
                "model": self.model, "messages": messages, "stop": self.stop, "stream": self.stream,
                "sampling": sampling | ({"seed": sampling["seed"] + index} if "seed" in sampling else {}),
            }
            for index in range(self.n)
        ]  # fmt: skip


def model_object(entry: dict[str, Any]) -> dict[str, Any]:
    """A model of /v1/models; what OpenAI's format has no field for stands under x_local."""
    local = {name: entry[name] for name in ("base", "format", "sampling", "task") if name in entry}
    return {"id": entry["name"], "object": "model", "created": entry["created"], "owned_by": "giong", "x_local": local}


def usage(num_prompt_tokens: int, num_completion_tokens: int) -> dict[str, Any]:
    details = {"reasoning_tokens": 0, "audio_tokens": 0, "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": details,
    }


class Answer:
    """What is the same in all objects that answer one request: id, time, model and fingerprint."""

    def __init__(self, model: str, created: int, fingerprint: str | None, *, include_usage: bool = False) -> None:
        self._head = {"id": "chatcmpl-" + secrets.token_hex(12), "created": created, "model": model, "system_fingerprint": fingerprint}
        self._include_usage = include_usage

    def completion(self, texts: list[tuple[str, str]], used: dict[str, Any]) -> dict[str, Any]:
        """The whole answer; `texts` are (text, finish_reason) in the order of the choices."""
        choices = [
            {
                "index": index, "message": {"role": "assistant", "content": text, "refusal": None, "annotations": []},
                "logprobs": None, "finish_reason": finish_reason,
            }
            for index, (text, finish_reason) in enumerate(texts)
        ]  # fmt: skip
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": used}

    def chunk(self, index: int, delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        """One server-sent event of a streamed answer."""
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._event([choice], {"usage": None} if self._include_usage else {})

    def usage_chunk(self, used: dict[str, Any]) -> bytes:
        return self._event([], {"usage": used})

    def _event(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> bytes:
        return event({**self._head, "object": "chat.completion.chunk", "choices": choices, **more})


def event(record: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:40] + "..."
