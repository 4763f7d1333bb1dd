"""Starts the model process, waits until it is ready, and knows afterwards whether and why it ended.

It runs in a session of its own, so that Ctrl-C in the terminal reaches the server alone, which then lets answers end and
stops the process. The pipe on its standard input is the leash: it closes with this process, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from giong import errors
from giong.clients.model_socket import TOKEN_VARIABLE, SocketAddress
from giong.contracts import Event
from giong.errors import ResourceError, ServingError
from giong.jobs.supervisor import worker_command, worker_environment

STOP_SECONDS = 10.0
KEPT_LINES = 40
"""Lines of its standard error that are kept to tell why it ended."""


class ModelProcess:
    """One model process for one project; a context manager that stops it at the end.

    `on_notice` is called, from another thread, with sentences for the user; also when the process ends unasked.
    """

    def __init__(self, project: Path, on_notice: Callable[[str], None] = lambda text: None) -> None:
        self._project, self._on_notice = project, on_notice
        self._process: subprocess.Popen[bytes] | None = None
        self._threads: list[threading.Thread] = []
        self._last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._error: errors.GiongError | None = None
        self._stopping = False
        self.address = ""
        self.token = secrets.token_urlsafe(24)

    def __enter__(self) -> ModelProcess:
        # Private to the user, and short: a Unix socket's path may have little more than 100 bytes.
        self._folder = tempfile.TemporaryDirectory(prefix="giong-", ignore_cleanup_errors=True)
        return self

    def __exit__(self, *reason: object) -> None:
        self.stop()
        self._folder.cleanup()

    def start(self) -> dict[str, Any]:
        """Start and wait until the models are loaded; returns the readiness event's `message` and `models`.

        Raises the model process's own GiongError where loading failed, ServingError where it ended without one.
        """
        address = SocketAddress.fresh(Path(self._folder.name))
        command = worker_command("serve", "--project", str(self._project), "--socket", str(address))
        environment = worker_environment() | {TOKEN_VARIABLE: self.token}
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, start_new_session=True
            )
        except OSError as error:
            raise ResourceError(f"The model process cannot be started: {error}", remedy="Free some memory and try again.") from error
        self._threads.append(threading.Thread(target=self._keep_last_lines, daemon=True))
        self._threads[0].start()
        while event := self._read_event():
            if event.kind == "result" and event.stage == "serve":
                self.address = event.data["address"]
                self._threads.append(threading.Thread(target=self._follow, daemon=True))
                self._threads[1].start()
                return {"message": event.message, "models": event.data["models"]}
            self._note(event)
        self._process.wait()
        self._threads[0].join(timeout=1)
        raise self._error or ServingError(self.why_gone(), remedy="Run `giong doctor`.")

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def why_gone(self) -> str:
        """One sentence on how the process ended."""
        if self._process is None:
            return "The model process was not started"
        with contextlib.suppress(subprocess.TimeoutExpired):
            # Its socket closes a moment before it can be waited for.
            self._process.wait(timeout=0.2)
        code = self._process.returncode
        if code is None:
            return "The model process does not answer"
        if code < 0:
            names = {number.value: number.name for number in signal.Signals}
            memory = ", as the system does when memory runs out" if -code == getattr(signal, "SIGKILL", None) else ""
            return f"The model process was ended by {names.get(-code, f'signal {-code}')}{memory}"
        last = next((line for line in reversed(self._last_lines) if line.strip()), "")
        return f"The model process ended with code {code}" + (f": {last.strip()}" if last else "")

    def stop(self) -> None:
        """Let it end by itself, for a while; then make it."""
        self._stopping = True
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        for seconds, then in ((STOP_SECONDS, process.terminate), (STOP_SECONDS, process.kill), (None, None)):
            try:
                process.wait(timeout=seconds)
                break
            except subprocess.TimeoutExpired:
                assert then is not None
                then()
        for thread in self._threads:
            thread.join(timeout=1)

    def _read_event(self) -> Event | None:
        """The next event on its standard output; None at the end. Other lines count as messages."""
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                return Event(**json.loads(line))
            except (ValueError, TypeError):
                self._last_lines.append(line.decode(errors="replace"))
        return None

    def _note(self, event: Event) -> None:
        if event.kind == "error":
            self._error = errors.from_dict(event.data)
        elif event.kind == "notice":
            self._on_notice(event.message)

    def _follow(self) -> None:
        while event := self._read_event():
            self._note(event)
        if not self._stopping:
            self._on_notice(f"{self.why_gone()}. Requests now get status 503; stop the server and start it again.")

    def _keep_last_lines(self) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._last_lines.append(line.decode(errors="replace"))
