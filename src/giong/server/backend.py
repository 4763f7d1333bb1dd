"""Who answers the chats: the contract that the routes speak to, and its implementation over the model process's socket.

One connection carries all requests, told apart by id. When it breaks, every request under way and every later one fails with
the reason; it is not mended silently, because the model process belongs to one server and does not come back by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from giong.clients.model_socket import MAX_LINE_BYTES, SocketAddress, encode_line
from giong.errors import ServingError
from giong.server.errors import ApiError, from_protocol


@dataclass(frozen=True, slots=True)
class Started:
    """The request was accepted and is being computed."""

    fingerprint: str | None
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is complete."""

    finish_reason: str
    num_prompt_tokens: int
    num_completion_tokens: int


ChatEvent = Started | TextDelta | Finished


@dataclass(frozen=True, slots=True)
class Judged:
    """What a model makes of whole texts, in their order: vectors, probabilities of `labels`, or values."""

    task: str
    problem: str | None
    labels: list[str]
    outputs: list[list[float]]
    num_prompt_tokens: int


class Backend(Protocol):
    """`chat` yields Started, any number of TextDelta, Finished; closing it early cancels the request. `texts` gives what a model makes
    of whole texts; cancelling it cancels the request.

    ApiError is raised for what the request is to blame for, ServingError where nobody answers any more.
    """

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    def check(self) -> None: ...

    async def models(self) -> list[dict[str, Any]]: ...

    def chat(self, call: dict[str, Any]) -> AsyncIterator[ChatEvent]: ...

    async def texts(self, model: str, texts: list[str]) -> Judged: ...


class SocketBackend:
    """The model process at `address`. `why_gone` tells, once the line is broken, what became of it."""

    def __init__(self, address: str, token: str = "", why_gone: Callable[[], str] = lambda: "The model process has ended") -> None:
        self._address, self._token, self._why_gone = SocketAddress.parse(address), token, why_gone
        self._ids = itertools.count(1)
        self._waiting: dict[str, asyncio.Queue[dict[str, Any] | None]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._listening: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect. Raises ServingError where nobody listens."""
        try:
            if self._address.path:
                reader, writer = await asyncio.open_unix_connection(self._address.path, limit=MAX_LINE_BYTES)
            else:
                reader, writer = await asyncio.open_connection(self._address.host, self._address.port, limit=MAX_LINE_BYTES)
        except OSError as error:
            raise self._gone() from error
        self._writer = writer
        if self._token:
            writer.write(encode_line({"op": "hello", "token": self._token}))
        self._listening = asyncio.create_task(self._listen(reader))

    async def close(self) -> None:
        if self._listening:
            self._listening.cancel()
        if self._writer:
            self._writer.close()
            self._writer = None

    def check(self) -> None:
        """Raises ServingError where the model process is gone."""
        if self._writer is None:
            raise self._gone()

    async def models(self) -> list[dict[str, Any]]:
        """The entries of all models that are served now."""
        async for record in self._ask({"op": "models"}):
            return record["models"]
        raise self._gone()

    async def chat(self, call: dict[str, Any]) -> AsyncIterator[ChatEvent]:
        records = self._ask({"op": "chat", **call})
        try:
            async for record in records:
                if record["type"] == "started":
                    yield Started(record["fingerprint"], record["num_prompt_tokens"])
                elif record["type"] == "delta":
                    yield TextDelta(record["text"])
                else:
                    yield Finished(record["finish_reason"], record["num_prompt_tokens"], record["num_completion_tokens"])
                    return
        finally:
            await records.aclose()

    async def texts(self, model: str, texts: list[str]) -> Judged:
        outputs: list[list[float]] = []
        async with contextlib.aclosing(self._ask({"op": "texts", "model": model, "texts": texts})) as records:
            async for record in records:
                if record["type"] == "done":
                    return Judged(record["task"], record["problem"], record["labels"], outputs, record["num_prompt_tokens"])
                outputs += record["outputs"]
        raise self._gone()

    async def _ask(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:  # type: ignore[misc]
        id = str(next(self._ids))
        answers: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._waiting[id] = answers
        ended = True
        try:
            self._write({**request, "id": id})
            ended = False
            while True:
                record = await answers.get()
                if record is None:
                    raise self._gone()
                ended = record["type"] in ("done", "error", "models")
                if record["type"] == "error":
                    raise from_protocol(record["error"], record["code"])
                yield record
                if ended:
                    return
        finally:
            del self._waiting[id]
            if not ended and self._writer:
                self._write({"op": "cancel", "id": id})

    def _write(self, record: dict[str, Any]) -> None:
        # Not drained: requests are small beside answers, and a cancellation must get through without waiting.
        self.check()
        assert self._writer is not None
        line = encode_line(record)
        if len(line) > MAX_LINE_BYTES:
            raise ApiError(f"The request has {len(line)} bytes and at most {MAX_LINE_BYTES} are taken", 413, remedy="Shorten the messages.")
        self._writer.write(line)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            # A line that is cut short leaves nothing to go on with; it ends as a broken connection does.
            with contextlib.suppress(ConnectionError, json.JSONDecodeError):
                while line := await reader.readline():
                    record = json.loads(line)
                    queue = self._waiting.get(str(record["id"]))
                    if queue:
                        queue.put_nowait(record)
        finally:
            if self._writer:
                self._writer.close()
                self._writer = None
            for queue in self._waiting.values():
                queue.put_nowait(None)

    def _gone(self) -> ServingError:
        return ServingError(self._why_gone(), remedy="Stop the server and start it again with `giong serve`.")
