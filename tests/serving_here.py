"""A project's models served from threads of this process: the model process's loop, its socket, and the HTTP side on a free port."""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import uvicorn

from giong.clients.model_socket import encode_line
from giong.contracts import Event
from giong.engine.step import evaluate_rows
from giong.server.app import create_app
from giong.server.backend import SocketBackend
from giong.serving.process import serve
from giong.workspace import Project


@contextlib.contextmanager
def served(project: Project, folder: Path) -> Iterator[str]:
    """Yields the root URL of the API."""
    ready: queue.SimpleQueue[Event] = queue.SimpleQueue()
    address = f"unix:{folder}/model.sock"
    model = threading.Thread(target=serve, args=(project.root, address, ready.put, evaluate_rows), daemon=True)
    # What pytest puts in the place of standard input has no file descriptor, and no parent holds its other end.
    with mock.patch("sys.stdin", None):
        model.start()
        while (event := ready.get(timeout=60)).kind != "result":
            pass
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(SocketBackend(address), None), log_level="critical", timeout_graceful_shutdown=1))
    http = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    http.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        http.join(timeout=10)
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(event.data["address"].removeprefix("unix:"))
            line.sendall(encode_line({"op": "shutdown"}))
        model.join(timeout=10)
        assert not model.is_alive(), json.dumps(event.data)
