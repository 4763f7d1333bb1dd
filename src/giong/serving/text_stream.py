"""From growing token lists to text that can be sent: whole characters only, and nothing that a stop string may still claim.

All tokens so far are decoded each time. Decoding only the newest would be linear, but differs from the text of the whole
at word borders of some tokenizers, and what is streamed must be what was evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
"""What a decoder shows for bytes that do not (yet) make a character."""


class TextStream:
    """The text of one answer. `push` and `finish` return what may be sent next; `stopped` tells that a stop string came."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._sent = ""
        self.stopped = False

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def push(self, token: int) -> str:
        """Take a token; returns the text that is now certain, often empty."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        # Half a character shows as U+FFFD at the end; the next token may complete it.
        return self._send(self._before_stop(text.rstrip(REPLACEMENT), hold=True))

    def finish(self) -> str:
        """The rest of the text, now that no more tokens come."""
        if self.stopped:
            return ""
        return self._before_stop(self._decode(self._tokens), hold=False)[len(self._sent) :]

    def _before_stop(self, text: str, hold: bool) -> str:
        found = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        if not hold:
            return text
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        return text[: len(text) - held]

    def _send(self, text: str) -> str:
        if not text.startswith(self._sent):
            return ""
        new = text[len(self._sent) :]
        self._sent = text
        return new


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with (and is longer than)."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
