"""What a worker does with a request to stop, and how one is passed on to it."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from giong import worker
from giong.contracts import Event
from giong.jobs import supervisor
from giong.worker import Stop


@pytest.fixture
def handlers() -> Iterator[None]:
    """Those of the tests come back."""
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    # The handler runs between two instructions.
    for _ in range(1000):
        pass


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_a_later_one_ends_at_once(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "SAME_REQUEST_SECONDS", 0.05)
    stop = Stop()
    stop.install()
    assert not stop()
    send(number)
    assert stop()
    time.sleep(0.1)
    with pytest.raises(KeyboardInterrupt):
        send(number)


@pytest.mark.usefixtures("handlers")
def test_one_request_that_comes_by_two_ways_is_one() -> None:
    """A service manager signals the worker and the process that passes its own signal on to it."""
    stop = Stop()
    stop.install()
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            send(number)
    except KeyboardInterrupt:
        pytest.fail("ended at once")
    assert stop()


class Started:
    """Stands for a worker process that goes on whatever it is sent."""

    def __init__(self) -> None:
        self.signals: list[tuple[int, float]] = []

    def send_signal(self, number: int) -> None:
        self.signals.append((number, time.monotonic()))

    def wait(self, timeout: float) -> None:
        time.sleep(timeout)
        raise subprocess.TimeoutExpired("worker", timeout)


@pytest.mark.usefixtures("handlers")
def test_a_second_request_is_passed_on_when_the_worker_takes_it_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """However soon the second comes; a third one waits for nothing."""
    assert supervisor.SECOND_REQUEST_SECONDS > worker.SAME_REQUEST_SECONDS
    monkeypatch.setattr(supervisor, "SECOND_REQUEST_SECONDS", 0.2)
    events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
    started = Started()
    with supervisor._SignalsPassedOn(events) as signals:
        signals.to(started)  # type: ignore[arg-type]
        for _ in range(3):
            send(signal.SIGINT)
    (first, at), (second, later), (third, last) = started.signals
    assert (first, second, third) == (signal.SIGINT, signal.SIGINT, signal.SIGKILL)
    assert later - at >= 0.2
    assert last - later < 0.1


def test_several_processes_have_minutes_to_write_their_last_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun kills them after 30 s unless its environment says otherwise; what the user says there counts."""
    name = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    monkeypatch.delenv(name, raising=False)
    assert name not in supervisor.worker_environment()
    assert int(supervisor.worker_environment(2)[name]) >= 300
    monkeypatch.setenv(name, "7")
    assert supervisor.worker_environment(2)[name] == "7"
