"""What remote models have answered, as an append-only JSONL file: after a kill nothing is asked, and paid, a second time.

A line is found again by the content of what was asked (model, request, sampling), so that a changed prompt is a new question and
an unchanged one is free, whichever step asks. The id belongs to the content: two equal requests are two draws.
"""

from __future__ import annotations

import threading
from dataclasses import asdict
from pathlib import Path

from giong.config.remote import RemoteModelConfig
from giong.contracts import Reply, Request
from giong.errors import DataError
from giong.workspace import append_jsonl, content_hash, mend_torn_end, read_jsonl


class ReplyJournal:
    """The replies of one remote model. Safe to share between threads.

    Raises DataError naming a line that is none of this journal's.
    """

    def __init__(self, path: Path, config: RemoteModelConfig) -> None:
        self.path = path
        self._model = (config.base_url, config.model)
        self._lock = threading.Lock()
        self._replies: dict[str, Reply] = {}
        if path.is_file():
            mend_torn_end(path)
            for number, row in enumerate(read_jsonl(path), start=1):
                try:
                    self._replies[row["key"]] = Reply(**row["reply"])
                except (KeyError, TypeError):
                    raise DataError(
                        "Not a line of the reply journal", place=f"{path}:{number}", remedy="Mend or delete that line."
                    ) from None

    def find(self, request: Request) -> Reply | None:
        """The reply that this request got before, or None."""
        return self._replies.get(self._key(request))

    def keep(self, request: Request, reply: Reply) -> None:
        """Write a reply down before anything else is done with it."""
        key = self._key(request)
        with self._lock:
            self._replies[key] = reply
            append_jsonl(self.path, {"key": key, "reply": asdict(reply)})

    def _key(self, request: Request) -> str:
        return content_hash(*self._model, request)
