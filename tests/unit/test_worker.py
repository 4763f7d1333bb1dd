"""What a worker does with a request to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from giong.worker import Stop


@pytest.fixture
def handlers() -> Iterator[None]:
    """Those of the tests come back."""
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_second_ends_at_once(number: int) -> None:
    stop = Stop()
    stop.install()
    assert not stop()
    os.kill(os.getpid(), number)
    assert stop()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
        # The handler runs between two instructions.
        for _ in range(1000):
            pass
