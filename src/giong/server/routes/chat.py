"""POST /v1/chat/completions, whole or streamed.

A streamed answer begins only when the model process has accepted the request, so that an unknown model is a 404 and not an
error inside a 200. When the client goes away, so does the request: its decoding stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from giong.errors import GiongError
from giong.server import wire
from giong.server.backend import Backend, ChatEvent, Finished, Started, TextDelta
from giong.server.errors import envelope

router = APIRouter()
CLIENT_CLOSED_REQUEST = 499
"""Nginx's status for the log; nobody receives it."""
Indexed = tuple[int, ChatEvent]
T = TypeVar("T")


@router.post("/chat/completions")
async def create(body: wire.ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    body.refuse_unsupported()
    events = interleave(request.app.state.backend, body.calls())
    streaming = False
    try:
        if not body.stream:
            return JSONResponse(await unless_gone(_collect(body, events), request))
        first = await unless_gone(anext(events), request)
        streaming = True
    except ClientDisconnect:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        if not streaming:
            await events.aclose()
    return EventStream(_stream(body, first, events), media_type="text/event-stream", headers={"cache-control": "no-cache"})


async def interleave(backend: Backend, calls: list[dict[str, Any]]) -> AsyncGenerator[Indexed, None]:
    """The events of all calls as they come, each with the index of its call. Closing it cancels what is under way."""
    arrived: asyncio.Queue[Indexed | GiongError | None] = asyncio.Queue()

    async def follow(index: int, call: dict[str, Any]) -> None:
        try:
            async with contextlib.aclosing(backend.chat(call)) as events:
                async for event in events:
                    arrived.put_nowait((index, event))
        except GiongError as error:
            arrived.put_nowait(error)
        finally:
            arrived.put_nowait(None)

    tasks = [asyncio.create_task(follow(index, call)) for index, call in enumerate(calls)]
    try:
        running = len(tasks)
        while running:
            event = await arrived.get()
            if isinstance(event, GiongError):
                raise event
            if event is None:
                running -= 1
            else:
                yield event
        # A failure that is none of ours must not end as an answer cut short.
        for task in tasks:
            task.result()
    finally:
        for task in tasks:
            task.cancel()


async def _collect(body: wire.ChatRequest, events: AsyncGenerator[Indexed, None]) -> dict[str, Any]:
    texts, reasons = [""] * body.n, ["length"] * body.n
    fingerprint, num_prompt_tokens, num_completion_tokens = None, 0, 0
    async for index, event in events:
        if isinstance(event, Started):
            fingerprint = event.fingerprint
        elif isinstance(event, TextDelta):
            texts[index] += event.text
        else:
            reasons[index] = event.finish_reason
            # The prompt counts once however many answers are drawn.
            num_prompt_tokens = event.num_prompt_tokens
            num_completion_tokens += event.num_completion_tokens
    answer = wire.Answer(body.model, int(time.time()), fingerprint)
    return answer.completion(list(zip(texts, reasons)), wire.usage(num_prompt_tokens, num_completion_tokens))


async def _stream(body: wire.ChatRequest, first: Indexed, events: AsyncGenerator[Indexed, None]) -> AsyncGenerator[bytes, None]:
    fingerprint = first[1].fingerprint if isinstance(first[1], Started) else None
    answer = wire.Answer(body.model, int(time.time()), fingerprint, include_usage=body.include_usage)
    num_prompt_tokens = num_completion_tokens = 0
    try:
        for index in range(body.n):
            yield answer.chunk(index, {"role": "assistant", "content": ""})
        async for index, event in events:
            if isinstance(event, TextDelta):
                yield answer.chunk(index, {"content": event.text})
            elif isinstance(event, Finished):
                num_prompt_tokens = event.num_prompt_tokens
                num_completion_tokens += event.num_completion_tokens
                yield answer.chunk(index, {}, event.finish_reason)
        if body.include_usage:
            yield answer.usage_chunk(wire.usage(num_prompt_tokens, num_completion_tokens))
        yield wire.DONE
    except GiongError as error:
        yield wire.event(envelope(error)[1])
    finally:
        await events.aclose()


class EventStream(StreamingResponse):
    """Server-sent events whose source is closed when the client goes away, not whenever it is collected."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()  # type: ignore[union-attr]


async def unless_gone(work: Awaitable[T], request: Request) -> T:
    """The result of `work`, or ClientDisconnect as soon as nobody waits for it any longer."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_leave(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect()
    finally:
        working.cancel()
        leaving.cancel()
        # The generator behind `working` may be closed only when it no longer runs.
        await asyncio.wait({working, leaving})


async def _leave(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
