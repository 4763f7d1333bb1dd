"""The model process: listens on a local socket, reads requests in one thread per client, decodes in the main thread.

It ends when it is told to, or when the pipe on its standard input closes: a server that was killed leaves no model behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import sys
import threading
from hmac import compare_digest
from pathlib import Path
from typing import IO, Any

from giong import config as configuration
from giong.clients.model_socket import MAX_LINE_BYTES, TOKEN_VARIABLE, SocketAddress, encode_line
from giong.contracts import Emit, Event
from giong.errors import ConfigError, DataError, GiongError, ResourceError
from giong.serving.row_models import JudgeRows, RowModels, RowScheduler, Texts
from giong.serving.scheduler import Chat, Scheduler
from giong.serving.served_models import ServedModels
from giong.workspace import Project


def serve(project_path: str | Path, socket_address: str, emit: Emit, judge_rows: JudgeRows) -> None:
    """Load the project's models and answer on `socket_address` (`unix:PATH` or `tcp:HOST:PORT`) until told to stop.

    When it is ready it emits a "result" event of stage "serve" with `address` and `models`. Raises ModelError and
    ConfigError for what cannot be loaded, ResourceError where the socket cannot be opened.
    """
    project = Project(project_path)
    config = configuration.load(project.config_path)
    if config.task == "mlm":
        raise ConfigError(
            "A model of task mlm answers nothing by itself", place="task", remedy="Train a classifier or an embedder from it."
        )
    try:
        listener, address = SocketAddress.parse(socket_address).listen()
    except OSError as error:
        raise ResourceError(
            f"The socket cannot be opened: {error.strerror or error}", place=socket_address, remedy="Start it again."
        ) from error
    with listener, contextlib.ExitStack() as ending:
        # Of a server that was killed nobody else cleans up.
        ending.callback(address.remove)
        models: ServedModels | RowModels
        scheduler: Scheduler | RowScheduler
        if config.task == "generate":
            models = ServedModels(project, config, emit)
            scheduler = Scheduler(models, config.serve.max_batch_requests, emit)
        else:
            models = RowModels(project, config, emit)
            scheduler = RowScheduler(models, judge_rows, emit)
        clients = _Clients(models, scheduler, token=os.environ.get(TOKEN_VARIABLE, "") if address.host else "")
        threading.Thread(target=clients.accept, args=(listener,), daemon=True, name="accept").start()
        _stop_with_parent(scheduler)
        tuned = [entry.name for entry in models.entries() if entry.folder]
        message = f"Loaded {models.describe_base()}; tuned models: {', '.join(tuned) or 'none yet'}"
        emit(Event("result", "serve", message, {"address": str(address), "models": [entry.to_dict() for entry in models.entries()]}))
        scheduler.run()


class _Clients:
    """The connected servers: reads their lines, hands requests to the scheduler, cancels what a client leaves behind."""

    def __init__(self, models: ServedModels | RowModels, scheduler: Scheduler | RowScheduler, token: str) -> None:
        self._models, self._scheduler, self._token = models, scheduler, token
        self._kinds = {"chat": Chat} if isinstance(scheduler, Scheduler) else {"texts": Texts}

    def accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._attend, args=(connection,), daemon=True, name="client").start()

    def _attend(self, connection: socket.socket) -> None:
        client = _Client(connection)
        with connection, contextlib.suppress(OSError), connection.makefile("rb") as lines:
            if not self._token or self._greeted(lines):
                while line := lines.readline(MAX_LINE_BYTES):
                    self._take(line, client)
        client.leave()

    def _greeted(self, lines: IO[bytes]) -> bool:
        try:
            hello = json.loads(lines.readline(4096))
        except (json.JSONDecodeError, UnicodeDecodeError):
            return False
        token = hello.get("token") if isinstance(hello, dict) else None
        return isinstance(token, str) and compare_digest(token.encode(), self._token.encode())

    def _take(self, line: bytes, client: _Client) -> None:
        try:
            record = json.loads(line)
            operation = record.get("op")
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
            client.refuse(None, DataError(f"Not a JSON object on one line: {error}"))
            return
        if operation == "models":
            client.send({"id": record.get("id"), "type": "models", "models": [entry.to_dict() for entry in self._models.entries()]})
        elif operation in self._kinds:
            try:
                request = self._kinds[operation].parse(record, client.send)
            except DataError as error:
                client.refuse(record.get("id"), error)
                return
            client.requests[request.id] = request
            self._scheduler.submit(request)
        elif operation in ("chat", "texts"):
            what = "label texts or turn them into vectors" if operation == "chat" else "write"
            client.refuse(record.get("id"), DataError(f"The models of this project {what}", remedy="Ask the route of their task."))
        elif operation == "cancel":
            client.cancel(str(record.get("id")))
        elif operation == "shutdown":
            self._scheduler.stop()
        elif operation != "hello":
            client.refuse(
                record.get("id"), DataError(f"Unknown operation {operation!r}", remedy="Known: models, chat, texts, cancel, shutdown.")
            )


class _Client:
    """One connection: sends from any thread, forgets requests when they end."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._gone = False
        self.requests: dict[str, Chat | Texts] = {}

    def send(self, record: dict[str, Any]) -> None:
        if record["type"] in ("done", "error"):
            self.requests.pop(str(record["id"]), None)
        with self._lock:
            if self._gone:
                return
            try:
                self._connection.sendall(encode_line(record))
            except OSError:
                self._gone = True

    def refuse(self, id: Any, error: GiongError) -> None:
        self.send({"id": id, "type": "error", "error": error.to_dict(), "code": "invalid_request"})

    def cancel(self, id: str) -> None:
        request = self.requests.pop(id, None)
        if request:
            request.cancelled.set()

    def leave(self) -> None:
        with self._lock:
            self._gone = True
        for id in list(self.requests):
            self.cancel(id)


def _stop_with_parent(scheduler: Scheduler | RowScheduler) -> None:
    """Stop when standard input ends, if it is a pipe: the parent holds its other end for as long as it lives."""
    if sys.stdin is None or sys.stdin.closed or not stat.S_ISFIFO(os.fstat(sys.stdin.fileno()).st_mode):
        return

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(sys.stdin.fileno(), 4096):
                pass
        scheduler.stop()

    threading.Thread(target=watch, daemon=True, name="parent").start()
