"""A scripted server of OpenAI's fine-tuning API in a thread: it takes files and jobs, and trains as it is told.

    with FakeProvider(lambda job: Training([{"step": 1, "full_valid_loss": 2.0}])) as provider:
        OpenAIFineTuning(RemoteTrainingConfig(base_url=provider.base_url, model="m", training_usd_per_million_tokens=1))

The script is called with each new `FakeJob` and returns how it goes, or a `Failure` in the place of a job.
"""

from __future__ import annotations

import email
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fake_server import FakeServer
from fake_teacher import Failure


@dataclass(frozen=True)
class Training:
    """`metrics` are the data of its events, oldest first; it ends as `status` when it has been asked about `num_polls` times."""

    metrics: Sequence[dict[str, Any]] = ()
    status: str = "succeeded"
    reason: str = ""
    trained_tokens: int | None = None
    num_polls: int = 1
    checkpoints: Sequence[dict[str, Any]] = ()


@dataclass
class FakeJob:
    """A job as it was asked for, with the rows of its files."""

    id: str
    body: dict[str, Any]
    rows: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    training: Training = field(default_factory=Training)
    num_polls: int = 0
    cancelled: bool = False

    @property
    def hyperparameters(self) -> dict[str, Any]:
        return self.body["method"]["supervised"]["hyperparameters"]

    def view(self) -> dict[str, Any]:
        ended = self.num_polls >= self.training.num_polls
        status = "cancelled" if self.cancelled else self.training.status if ended else "running"
        return {
            "id": self.id, "object": "fine_tuning.job", "status": status, "model": self.body["model"],
            "user_provided_suffix": self.body.get("suffix"), "trained_tokens": self.training.trained_tokens if ended else None,
            "fine_tuned_model": f"ft:{self.id}" if status == "succeeded" else None,
            "error": {"code": "scripted", "message": self.training.reason, "param": None} if status == "failed" else None,
        }  # fmt: skip


class FakeProvider(FakeServer):
    """The server; `jobs` holds every job that was made, `requests` every request as "METHOD path"; `failed_polls` answer the next
    questions about a job."""

    def __init__(self, script: Callable[[FakeJob], Training | Failure]) -> None:
        self.script = script
        self.files: dict[str, list[dict[str, Any]]] = {}
        self.jobs: dict[str, FakeJob] = {}
        self.requests: list[str] = []
        self.keys: set[str] = set()
        self.failed_polls: list[Failure] = []
        super().__init__(_handler(self))

    def answer(self, method: str, path: list[str], query: dict[str, str], content: bytes, content_type: str) -> dict[str, Any] | Failure:
        match method, path:
            case "POST", ["files"]:
                parts = email.message_from_bytes(f"Content-Type: {content_type}\n\n".encode() + content).get_payload()
                given = {part.get_param("name", header="content-disposition"): part.get_payload(decode=True) for part in parts}
                assert given["purpose"] == b"fine-tune"
                name = f"file-{len(self.files) + 1}"
                self.files[name] = [json.loads(line) for line in given["file"].splitlines()]
                return {"id": name, "object": "file", "status": "uploaded"}
            case "GET", ["files", name]:
                return {"id": name, "object": "file", "status": "processed"}
            case "POST", ["fine_tuning", "jobs"]:
                body = json.loads(content)
                name = f"ftjob-{len(self.jobs) + 1}"
                job = FakeJob(name, body, self.files[body["training_file"]], self.files[body["validation_file"]])
                training = self.script(job)
                if isinstance(training, Failure):
                    return training
                job.training = training
                self.jobs[name] = job
                return job.view()
            case "GET", ["fine_tuning", "jobs"]:
                return _page([job.view() for job in reversed(self.jobs.values())], query)
            case "GET", ["fine_tuning", "jobs", _] if self.failed_polls:
                return self.failed_polls.pop()
            case "GET", ["fine_tuning", "jobs", name]:
                view = self.jobs[name].view()
                self.jobs[name].num_polls += 1
                return view
            case "POST", ["fine_tuning", "jobs", name, "cancel"]:
                self.jobs[name].cancelled = True
                return self.jobs[name].view()
            case "GET", ["fine_tuning", "jobs", name, "events"]:
                events = [
                    {"type": "message", "data": None},
                    *({"type": "metrics", "data": data} for data in self.jobs[name].training.metrics),
                ]
                return _page([{"id": f"ftevent-{n}", **event} for n, event in reversed(list(enumerate(events)))], query)
            case "GET", ["fine_tuning", "jobs", name, "checkpoints"]:
                rows = [{"id": f"ftckpt-{n}", **row} for n, row in enumerate(self.jobs[name].training.checkpoints)]
                return _page(rows[::-1], query)
        return Failure(404, f"no route {method} {path}")


def _page(rows: list[dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
    start = next((n + 1 for n, row in enumerate(rows) if row["id"] == query.get("after")), 0)
    end = start + int(query.get("limit", 20))
    return {"object": "list", "data": rows[start:end], "has_more": end < len(rows)}


def _handler(provider: FakeProvider) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = urlsplit(self.path)
            path = parts.path.removeprefix("/v1/")
            provider.requests.append(f"{self.command} {path}")
            provider.keys.add(self.headers["Authorization"])
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            found = provider.answer(self.command, path.split("/"), query, content, self.headers.get("Content-Type", ""))
            if isinstance(found, Failure):
                if found.drop:
                    self.close_connection = True
                    return
                error = {"message": found.message, "type": "scripted", "param": found.param, "code": found.code}
                self._send(found.status, {"error": error}, found.headers)
            else:
                self._send(200, found, {})

        do_POST = do_GET

        def _send(self, status: int, value: dict[str, Any], headers: dict[str, str]) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            for key, given in {"Content-Type": "application/json", **headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, given)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
