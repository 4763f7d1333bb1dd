"""The line between the server and the model process: JSON objects, one per line, over a local stream socket.

It is not HTTP, because OpenAI's wire format lives once, in giong.server. Where there are no Unix sockets it is loopback TCP,
which any user of the machine can reach, so there the first line must carry a random token.

    client                                                   model process
    {"op": "hello", "token"}                                 (nothing, or the line is closed; TCP only)
    {"op": "models", "id"}                                   {"id", "type": "models", "models": [ModelEntry]}
    {"op": "chat", "id", "model", "messages", "sampling",    {"id", "type": "started", "fingerprint", "num_prompt_tokens"}
     "stop": [str], "stream": bool}                          {"id", "type": "delta", "text"} ...       (once, where not "stream")
                                                             {"id", "type": "done", "finish_reason", "num_prompt_tokens",
                                                              "num_completion_tokens"}
                                                       or    {"id", "type": "error", "error": GiongError.to_dict(), "code"}
    {"op": "texts", "id", "model", "texts": [str]}           {"id", "type": "part", "outputs": [[float]]} ...     (in order)
                                                             {"id", "type": "done", "task", "problem", "labels": [str],
                                                              "num_prompt_tokens"}
                                                       or    an error as above
    {"op": "cancel", "id"}                                   (nothing more about that id)
    {"op": "shutdown"}                                       (the process ends)

`sampling` holds only the fields that the client gave; the rest are the model's saved sampling. A ModelEntry has `name`,
`base`, `format`, `created` (unix seconds), `sampling`, `fingerprint` and `task`. `code` is one of CODES. Chats are taken in a project of
task `generate`, texts in the others: their outputs are vectors of length 1, probabilities of the labels, or a value.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from giong.errors import ServingError

TOKEN_VARIABLE = "GIONG_SOCKET_TOKEN"
"""The environment variable that carries the token of a TCP line; a command line could be read by other users."""
MAX_LINE_BYTES = 16 * 2**20
CODES = ("model_not_found", "invalid_request", "context_length_exceeded", "model_failed", "shutting_down")


@dataclass(frozen=True, slots=True)
class SocketAddress:
    """`unix:PATH` or `tcp:HOST:PORT`; port 0 takes a free one."""

    path: str = ""
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> SocketAddress:
        """Raises ServingError where `text` is neither form."""
        kind, _, rest = text.partition(":")
        host, _, port = rest.rpartition(":")
        if kind == "unix" and rest:
            return cls(path=rest)
        if kind == "tcp" and host and port.isdigit():
            return cls(host=host, port=int(port))
        raise ServingError(f"{text!r} is not the address of a socket", remedy="Use unix:PATH or tcp:HOST:PORT.")

    @classmethod
    def fresh(cls, folder: Path) -> SocketAddress:
        """A new address: a socket in `folder` (which must be private to the user) where the system has them."""
        if hasattr(socket, "AF_UNIX"):
            return cls(path=str(folder / "model.sock"))
        return cls(host="127.0.0.1")

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else f"tcp:{self.host}:{self.port}"

    def listen(self) -> tuple[socket.socket, SocketAddress]:
        """A listening socket and its address with the port filled in."""
        if self.path:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(self.path)
            address = self
        else:
            listener = socket.create_server((self.host, self.port))
            address = SocketAddress(host=self.host, port=listener.getsockname()[1])
        listener.listen()
        return listener, address

    def remove(self) -> None:
        """Take a Unix socket off the disk, with its folder if nothing else is in it."""
        if self.path:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
                os.rmdir(os.path.dirname(self.path))


def encode_line(record: dict[str, Any]) -> bytes:
    """One record as a line."""
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
