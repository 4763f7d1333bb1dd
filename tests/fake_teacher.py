"""A scripted OpenAI-compatible server in a thread: it answers, fails and counts as it is told.

    with FakeTeacher(lambda call: "a rewrite") as teacher:
        RemoteModel(RemoteModelConfig(base_url=teacher.base_url, model="m"), ledger)

The script is called with each `Call` and returns a text, an `Answer`, or a `Failure`; a list of these is used up in order
and its last one repeated.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from fake_server import FakeServer


@dataclass(frozen=True)
class Call:
    """One request as it arrived; `number` counts from 1."""

    number: int
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def user(self) -> str:
        return next(message["content"] for message in self.body["messages"] if message["role"] == "user")

    @property
    def passage(self) -> str:
        """What stands between the tags of a synthesis task."""
        return self.user.partition("<text>\n")[2].rpartition("\n</text>")[0]


@dataclass(frozen=True)
class Answer:
    """A chat completion; with `body`, exactly those bytes with status 200."""

    text: str | None = ""
    finish_reason: str = "stop"
    num_prompt_tokens: int | None = 100
    num_completion_tokens: int | None = 50
    choices: list[Any] | None = None
    body: bytes | None = None
    content_type: str = "application/json"


@dataclass(frozen=True)
class Failure:
    """An HTTP status with OpenAI's error shape; `delay_seconds` waits first (for time-outs), `drop` closes the line unanswered."""

    status: int = 500
    message: str = "scripted failure"
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay_seconds: float = 0.0
    drop: bool = False


Scripted = str | Answer | Failure
Script = Callable[[Call], Scripted] | Sequence[Scripted]


class FakeTeacher(FakeServer):
    """The server; `calls` holds every request that arrived, `most_at_once` the most that were under way together."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._lock = threading.Lock()
        self._under_way = 0
        self.calls: list[Call] = []
        self.most_at_once = 0
        self._stopping = threading.Event()
        super().__init__(_handler(self))

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        super().__exit__()

    @property
    def num_calls(self) -> int:
        return len(self.calls)

    def answer(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Scripted:
        with self._lock:
            call = Call(len(self.calls) + 1, path, headers, body)
            self.calls.append(call)
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            scripted = self._script(call) if callable(self._script) else self._script[min(call.number, len(self._script)) - 1]
            if isinstance(scripted, Failure) and scripted.delay_seconds:
                self._stopping.wait(scripted.delay_seconds)
            return scripted
        finally:
            with self._lock:
                self._under_way -= 1


def completion(answer: Answer) -> bytes:
    """The JSON of a chat completion."""
    if answer.body is not None:
        return answer.body
    choice = {"index": 0, "message": {"role": "assistant", "content": answer.text}, "finish_reason": answer.finish_reason}
    value: dict[str, Any] = {
        "id": "chatcmpl-1", "object": "chat.completion", "created": int(time.time()), "model": "scripted",
        "choices": [choice] if answer.choices is None else answer.choices,
    }  # fmt: skip
    if answer.num_prompt_tokens is not None and answer.num_completion_tokens is not None:
        total = answer.num_prompt_tokens + answer.num_completion_tokens
        value["usage"] = {
            "prompt_tokens": answer.num_prompt_tokens, "completion_tokens": answer.num_completion_tokens, "total_tokens": total,
        }  # fmt: skip
    return json.dumps(value).encode()


def _handler(teacher: FakeTeacher) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            scripted = teacher.answer(self.path, {key.lower(): value for key, value in self.headers.items()}, body)
            if isinstance(scripted, str):
                scripted = Answer(scripted)
            try:
                if isinstance(scripted, Answer):
                    self._send(200, completion(scripted), {"Content-Type": scripted.content_type})
                elif scripted.drop:
                    self.close_connection = True
                else:
                    error = {"message": scripted.message, "type": "scripted", "param": scripted.param, "code": scripted.code}
                    headers = {"Content-Type": "application/json", **scripted.headers}
                    self._send(scripted.status, json.dumps({"error": error}).encode(), headers)
            except OSError:
                # The client has given up waiting: that is what a scripted time-out is for.
                self.close_connection = True

        def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
