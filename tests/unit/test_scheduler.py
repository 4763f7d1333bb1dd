"""The queue of the model process: who joins a running batch, and who is not overtaken."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import pytest

from giong.contracts import Sampling
from giong.errors import ServingError
from giong.generation.local import LocalModel
from giong.serving.scheduler import Chat, Scheduler
from giong.serving.served_models import ModelEntry

LONG, SHORT = 60, 3


class Models:
    """Two names for one tiny base; `version` is what a new training would change."""

    def __init__(self, local: LocalModel) -> None:
        self.local, self.version, self.readied = local, "1", []

    def entry(self, name: str) -> ModelEntry:
        if name not in ("alice", "bob"):
            raise ServingError(f"The model {name!r} is not served here")
        return ModelEntry(name, "tiny", "base", 0, Sampling(), f"giong-{name}-{self.version}")

    def ready(self, entry: ModelEntry) -> tuple[LocalModel, None]:
        self.readied.append(entry.fingerprint)
        return self.local, None

    def drop_deleted(self) -> None:
        pass


class Desk:
    """A scheduler in a thread of its own, and what it sent, in order: (chat, kind of record)."""

    def __init__(self, models: Models) -> None:
        self.models, self.sent = models, []
        self.on_sent: Callable[[str, str], None] = lambda name, kind: None
        self.scheduler = Scheduler(models, 4, lambda event: None)  # type: ignore[arg-type]
        self.thread = threading.Thread(target=self.scheduler.run)
        self.ended: dict[str, threading.Event] = {}

    def ask(self, name: str, model: str, num_tokens: int) -> None:
        def send(record: dict[str, Any]) -> None:
            self.sent.append((name, record["type"]))
            self.on_sent(name, record["type"])
            if record["type"] in ("done", "error"):
                self.ended[name].set()

        self.ended[name] = threading.Event()
        messages = [{"role": "user", "content": f"Say {name}."}]
        sampling = dataclasses.asdict(Sampling(max_new_tokens=num_tokens))
        self.scheduler.submit(Chat.parse({"id": name, "model": model, "messages": messages, "sampling": sampling, "stream": True}, send))

    def wait(self) -> list[str]:
        """Names in the order in which they ended."""
        for event in list(self.ended.values()):
            assert event.wait(30)
        return [name for name, kind in self.sent if kind in ("done", "error")]


@pytest.fixture
def desk(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    loaded = tiny_model("llama")
    # Random weights may end at once: here every answer takes the length that it was given.
    monkeypatch.setattr(type(loaded.chat), "end_token_ids", property(lambda chat: ()), raising=False)
    made = Desk(Models(LocalModel(loaded)))
    made.thread.start()
    yield made
    made.scheduler.stop()
    made.thread.join(30)
    assert not made.thread.is_alive()


def at_delta(desk: Desk, name: str, number: int, act: Callable[[], None]) -> None:
    """Do something, in the decoding thread, when that chat has had so many deltas."""
    counted = [0]

    def on_sent(sender: str, kind: str) -> None:
        counted[0] += sender == name and kind == "delta"
        if counted[0] == number:
            counted[0] += 1
            act()

    desk.on_sent = on_sent


def test_a_short_chat_joins_a_long_one_and_ends_before_it(desk: Desk):
    at_delta(desk, "long", 5, lambda: desk.ask("short", "alice", SHORT))
    desk.ask("long", "alice", LONG)
    desk.ended["long"].wait(30)
    assert desk.wait() == ["short", "long"]
    assert len(desk.models.readied) == 1


def test_who_waits_for_another_model_is_not_overtaken(desk: Desk):
    def others_come() -> None:
        desk.ask("other", "bob", SHORT)
        desk.ask("later", "alice", SHORT)

    at_delta(desk, "long", 5, others_come)
    desk.ask("long", "alice", LONG)
    desk.ended["long"].wait(30)
    assert desk.wait() == ["long", "other", "later"]


def test_a_model_that_was_trained_anew_takes_nobody_into_the_old_batch(desk: Desk):
    def trained_anew() -> None:
        desk.models.version = "2"
        desk.ask("new", "alice", SHORT)

    at_delta(desk, "long", 5, trained_anew)
    desk.ask("long", "alice", LONG)
    desk.ended["long"].wait(30)
    assert desk.wait() == ["long", "new"]
    assert desk.models.readied == ["giong-alice-1", "giong-alice-2"]


def test_who_left_before_joining_is_not_decoded(desk: Desk):
    def come_and_go() -> None:
        desk.ask("gone", "alice", SHORT)
        desk.scheduler._waiting[-1].cancelled.set()
        desk.ended.pop("gone")

    at_delta(desk, "long", 5, come_and_go)
    desk.ask("long", "alice", LONG)
    desk.ended["long"].wait(30)
    assert desk.wait() == ["long"]
    assert "gone" not in [name for name, _ in desk.sent]
