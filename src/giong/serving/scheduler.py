"""Waiting chats in, batches out: the oldest waiting chat chooses the model, others for that model are decoded along with it.

Chats that come later join the running batch as long as the oldest of those who wait is for the same model. Only one adapter can be
active at a time, so who waits for another one is not overtaken: the batch takes nobody in any more and runs to its end.
"""

from __future__ import annotations

import dataclasses
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from giong.contracts import Emit, Event, FinishReason, Message, Sampling
from giong.errors import DataError, GiongError, ModelError, ResourceError, ServingError
from giong.generation.local import LocalModel
from giong.serving.served_models import ModelEntry, ServedModels, parse_sampling
from giong.serving.text_stream import TextStream

Send = Callable[[dict[str, Any]], None]
"""Sends one record to the client that asked; silently nothing once that client is gone."""
ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(eq=False)
class Chat:
    """One request on its way. `cancelled` may be set by any thread; the rest belongs to the decoding thread."""

    id: str
    model: str
    messages: tuple[Message, ...]
    sampling: dict[str, Any]
    stop: tuple[str, ...]
    stream: bool
    send: Send
    cancelled: threading.Event = dataclasses.field(default_factory=threading.Event)
    prompt: list[int] = dataclasses.field(default_factory=list)
    text: TextStream | None = None
    unsent: list[str] = dataclasses.field(default_factory=list)
    done: bool = False

    @classmethod
    def parse(cls, record: dict[str, Any], send: Send) -> Chat:
        """Raises DataError where a field of the protocol is missing or of the wrong type."""
        messages, stop, sampling = record.get("messages"), record.get("stop") or [], record.get("sampling") or {}
        if not isinstance(record.get("model"), str) or not isinstance(messages, list) or not messages:
            raise DataError("A chat needs a model and messages", remedy="Send a list of at least one message.")
        for message in messages:
            known = isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)
            if not known:
                raise DataError(f"A message needs a role ({', '.join(ROLES)}) and a text as content")
        if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
            raise DataError("stop must be a list of texts that are not empty")
        parse_sampling(sampling, Sampling())
        turns = tuple(Message(message["role"], message["content"]) for message in messages)
        return cls(str(record.get("id")), record["model"], turns, sampling, tuple(stop), bool(record.get("stream")), send)

    def fail(self, error: GiongError, code: str) -> None:
        self.done = True
        self.send({"id": self.id, "type": "error", "error": error.to_dict(), "code": code})

    def advance(self, token: int | None, finish_reason: FinishReason | None) -> None:
        """Take a token from the decoder and send what has become certain; after the end nothing more is sent."""
        if self.done or self.cancelled.is_set():
            return
        assert self.text is not None
        if token is not None:
            self._deliver(self.text.push(token))
        if finish_reason and not self.text.stopped:
            self._deliver(self.text.finish())
        if self.text.stopped:
            finish_reason = "stop"
        if finish_reason:
            self._close(finish_reason)

    def _deliver(self, text: str) -> None:
        if text and self.stream:
            self.send({"id": self.id, "type": "delta", "text": text})
        elif text:
            self.unsent.append(text)

    def _close(self, finish_reason: FinishReason) -> None:
        assert self.text is not None
        if self.unsent:
            self.send({"id": self.id, "type": "delta", "text": "".join(self.unsent)})
        self.done = True
        self.send(
            {
                "id": self.id, "type": "done", "finish_reason": finish_reason, "num_prompt_tokens": len(self.prompt),
                "num_completion_tokens": self.text.num_tokens,
            }
        )  # fmt: skip


class Scheduler:
    """The queue and the loop that empties it. `run` returns after `stop`; all else may be called from any thread."""

    def __init__(self, models: ServedModels, max_batch_requests: int, emit: Emit) -> None:
        self._models, self._max_batch_requests, self._emit = models, max_batch_requests, emit
        self._waiting: deque[Chat] = deque()
        self._changed = threading.Condition()
        self._stopping = False

    def submit(self, chat: Chat) -> None:
        """Queue a chat. An unknown model is refused at once, even while a batch is being decoded."""
        try:
            self._models.entry(chat.model)
        except GiongError as error:
            chat.fail(error, _code(error))
            return
        with self._changed:
            self._waiting.append(chat)
            self._changed.notify()

    def stop(self) -> None:
        """End the loop; the running batch is given up at its next token."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def run(self) -> None:
        """Decode until `stop`; then tell those who still wait."""
        while batch := self._next_batch():
            self._models.drop_deleted()
            self._answer(batch)
        for chat in self._waiting:
            chat.fail(ServingError("The server is shutting down", remedy="Ask again when it is back."), "shutting_down")

    def _next_batch(self) -> list[Chat]:
        """Wait for work. The oldest chat and the waiting ones for its model; empty when stopping."""
        with self._changed:
            while True:
                if self._stopping:
                    return []
                self._waiting = deque(chat for chat in self._waiting if not chat.cancelled.is_set())
                if self._waiting:
                    break
                self._changed.wait()
            first = self._waiting[0]
            batch = [chat for chat in self._waiting if chat.model == first.model][: self._max_batch_requests]
            self._waiting = deque(chat for chat in self._waiting if chat not in batch)
            return batch

    def _joining(self, model: str, entry: ModelEntry, num_free: int) -> list[Chat]:
        """At most so many of those who wait in front for the model that is being decoded; nobody once that was replaced or deleted."""
        joining: list[Chat] = []
        with self._changed:
            if not self._waiting or self._waiting[0].model != model or not self._is_current(model, entry):
                return []
            while self._waiting and not self._stopping and len(joining) < num_free and self._waiting[0].model == model:
                chat = self._waiting.popleft()
                if not chat.cancelled.is_set():
                    joining.append(chat)
        return joining

    def _is_current(self, model: str, entry: ModelEntry) -> bool:
        try:
            return self._models.entry(model).fingerprint == entry.fingerprint
        except GiongError:
            return False

    def _answer(self, batch: list[Chat]) -> None:
        try:
            entry = self._models.entry(batch[0].model)
            local, adapter = self._models.ready(entry)
        except GiongError as error:
            if not isinstance(error, ServingError):
                self._emit(Event("notice", "serve", f"The model {batch[0].model!r} cannot be served: {error}"))
            for chat in batch:
                chat.fail(error, _code(error))
            return
        samplings = {chat: sampling for chat in batch if (sampling := self._begin(chat, entry, local, adapter))}
        chats = list(samplings)

        def join(num_free: int) -> Iterator[tuple[list[int], Sampling]]:
            for chat in self._joining(batch[0].model, entry, num_free):
                if sampling := self._begin(chat, entry, local, adapter):
                    chats.append(chat)
                    yield chat.prompt, sampling

        try:
            local.generate(
                [chat.prompt for chat in chats], list(samplings.values()), adapter, join=join,
                room=dataclasses.replace(local.room, max_rows=self._max_batch_requests),
                on_token=lambda index, token, reason: self._stopping or chats[index].advance(token, reason),
                cancelled=lambda index: self._stopping or chats[index].done or chats[index].cancelled.is_set(),
            )  # fmt: skip
        except (RuntimeError, MemoryError) as error:
            # What torch raises (memory, for one) ends this batch and not the process.
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            refused = ResourceError(f"The answer could not be computed: {reason}", remedy="Ask with a shorter request, or fewer at once.")
            self._emit(Event("notice", "serve", str(refused)))
            for chat in chats:
                if not chat.done:
                    chat.fail(refused, "model_failed")
        if self._stopping:
            self._waiting.extend(chat for chat in chats if not chat.done)

    def _begin(self, chat: Chat, entry: ModelEntry, local: LocalModel, adapter: str | None) -> Sampling | None:
        """Encode the prompt and settle the sampling; None where the request was refused."""
        format = local.loaded.chat
        try:
            chat.prompt = format.encode_prompt(chat.messages)
        except ModelError as error:
            chat.fail(error, "invalid_request")
            return None
        context = local.context(adapter)
        room = context - len(chat.prompt)
        if room < 1 or not chat.prompt:
            too_long = f"The messages have {len(chat.prompt)} tokens and this model's context holds {context}"
            chat.fail(DataError(too_long, remedy="Shorten the messages."), "context_length_exceeded")
            return None
        sampling = parse_sampling(chat.sampling, entry.sampling)
        if "seed" not in chat.sampling and not entry.sampling.seed:
            # Nobody chose a seed: asking again should bring another draw. A saved seed other than 0 is a choice.
            sampling = dataclasses.replace(sampling, seed=secrets.randbits(63))
        chat.text = TextStream(format.decode, chat.stop)
        chat.send({"id": chat.id, "type": "started", "fingerprint": entry.fingerprint, "num_prompt_tokens": len(chat.prompt)})
        return dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))


def _code(error: GiongError) -> str:
    return "model_not_found" if isinstance(error, ServingError) else "model_failed"
