"""The HTTP side without a model: wire format, errors, order of the stream, key, cancellation, and the socket to the model process.

A real uvicorn answers on a free port, because what clients see (headers, disconnections) is made outside the application.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from giong.clients.model_socket import SocketAddress, encode_line
from giong.errors import ConfigError, ResourceError, ServingError
from giong.server.app import create_app
from giong.server.backend import Backend, ChatEvent, Finished, SocketBackend, Started, TextDelta
from giong.server.errors import ApiError

ENTRIES = [
    {"name": "tiny", "base": "tiny", "format": "base", "created": 5, "sampling": {"temperature": 0.0}, "fingerprint": "fp"},
    {"name": "org/voice", "base": "tiny", "format": "adapter", "created": 7, "sampling": {"temperature": 0.7}, "fingerprint": "fp2"},
]
HELLO = [{"role": "user", "content": "Hello"}]


class ScriptedBackend:
    """Answers every chat with the words of `script`, and remembers what it was asked."""

    def __init__(self, script: list[Any] | None = None) -> None:
        self.script = ["Good", " ", "morning"] if script is None else script
        self.calls: list[dict[str, Any]] = []
        self.num_closed_early = 0

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    def check(self) -> None:
        pass

    async def models(self) -> list[dict[str, Any]]:
        return ENTRIES

    async def chat(self, call: dict[str, Any]) -> AsyncIterator[ChatEvent]:
        self.calls.append(call)
        finished = False
        try:
            if call["model"] == "nobody":
                raise ApiError("The model 'nobody' is not served here", 404, param="model", code="model_not_found")
            yield Started("fp", 11)
            for part in self.script:
                if isinstance(part, Exception):
                    raise part
                if isinstance(part, float):
                    await asyncio.sleep(part)
                else:
                    yield TextDelta(part)
            finished = True
            yield Finished("stop", 11, 3)
        finally:
            self.num_closed_early += not finished


@contextlib.contextmanager
def serving(backend: Backend, api_key: str | None = None) -> Iterator[str]:
    """The API on a free port; yields its root URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(backend, api_key), log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listener.close()


def client(url: str, api_key: str = "anything") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=0, timeout=20)


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.fixture(scope="module")
def backend() -> ScriptedBackend:
    return ScriptedBackend()


@pytest.fixture(scope="module")
def url(backend: ScriptedBackend) -> Iterator[str]:
    with serving(backend) as root:
        yield root


def post(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json={"model": "tiny", "messages": HELLO} | body)


# --- the official client ---------------------------------------------------------------------------------------------------------


def test_a_completion_as_the_official_client_reads_it(url: str) -> None:
    answer = client(url).chat.completions.create(model="tiny", messages=HELLO)  # type: ignore[arg-type]
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert abs(answer.created - time.time()) < 60
    assert (answer.model, answer.system_fingerprint) == ("tiny", "fp")
    assert answer.choices[0].message.content == "Good morning"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (11, 3, 14)
    assert answer._request_id
    assert answer._request_id.startswith("req_")


def test_a_stream_as_the_official_client_reads_it(url: str) -> None:
    stream = client(url).chat.completions.create(model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True})  # type: ignore[call-overload]
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Good morning"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 14


def test_models_as_the_official_client_reads_them(url: str) -> None:
    models = list(client(url).models.list())
    assert [model.id for model in models] == ["tiny", "org/voice"]
    assert (models[1].created, models[1].owned_by, models[1].object) == (7, "giong", "model")
    assert models[1].x_local == {"base": "tiny", "format": "adapter", "sampling": {"temperature": 0.7}}  # type: ignore[attr-defined]
    # The client sends the slash as %2F; other clients send it raw.
    assert client(url).models.retrieve("org/voice").id == "org/voice"
    assert httpx.get(f"{url}/v1/models/org/voice").json()["id"] == "org/voice"


def test_several_answers_draw_from_seeds_of_their_own_and_count_the_prompt_once(url: str, backend: ScriptedBackend) -> None:
    backend.calls.clear()
    answer = client(url).chat.completions.create(model="tiny", messages=HELLO, n=3, seed=40)  # type: ignore[arg-type]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {"Good morning"}
    assert sorted(call["sampling"]["seed"] for call in backend.calls) == [40, 41, 42]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (11, 9)
    backend.calls.clear()
    post(url, n=2)
    first, second = (call["sampling"]["seed"] for call in backend.calls)
    assert first != second


# --- the wire --------------------------------------------------------------------------------------------------------------------


def test_the_stream_is_in_the_documented_order(url: str) -> None:
    response = post(url, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""}, {"content": "Good"}, {"content": " "}, {"content": "morning"}, {},
    ]  # fmt: skip
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, None, "stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all("usage" not in chunk for chunk in chunks)


def test_with_usage_every_chunk_carries_the_field_and_a_last_one_the_figures(url: str) -> None:
    blocks = post(url, stream=True, stream_options={"include_usage": True}).text.split("\n\n")[:-2]
    chunks = [json.loads(block.removeprefix("data: ")) for block in blocks]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 5
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 14


def test_only_given_fields_reach_the_model_and_roles_and_parts_are_translated(url: str, backend: ScriptedBackend) -> None:
    backend.calls.clear()
    parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    ignored = {"user": "someone", "store": True, "presence_penalty": 0, "seed": None}
    body = {"messages": messages, "stop": "END", "max_tokens": 9, "top_p": 0.5, **ignored}
    assert post(url, **body).status_code == 200
    assert backend.calls == [
        {
            "model": "tiny", "stop": ["END"], "stream": False, "sampling": {"top_p": 0.5, "max_new_tokens": 9},
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        }
    ]  # fmt: skip
    backend.calls.clear()
    post(url, max_tokens=9, max_completion_tokens=4)
    assert backend.calls[0]["sampling"]["max_new_tokens"] == 4


# --- refusals --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"n": 9}, "n", "less than or equal to 8"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "king", "content": "b"}]}, "messages[1].role", "'user'"),
        ({"messages": [{"role": "tool", "content": "b"}]}, "messages[0].role", "tools"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "'image_url'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"stop": ["a", ""]}, "stop", "none of them empty"),
        ({"model": None}, "model", "string"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "only 0"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "'text'"),
    ],
)
def test_what_cannot_be_honoured_is_a_400_that_names_the_field(url: str, body: dict[str, Any], param: str, says: str) -> None:
    response = post(url, **body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert says in error["message"]
    assert response.headers["x-request-id"]


HALF_A_CHARACTER = b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}'


@pytest.mark.parametrize("content", [b"{", b"", b"[1]", b'{"model": "\xff"}', HALF_A_CHARACTER])
def test_a_body_that_cannot_be_read_is_a_400(url: str, content: bytes) -> None:
    response = httpx.post(f"{url}/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_a_404_also_when_streaming(url: str, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client(url).chat.completions.create(model="nobody", messages=HELLO, stream=stream)  # type: ignore[call-overload]
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match="Served are: tiny, org/voice"):
        client(url).models.retrieve("nobody")


def test_the_frameworks_own_errors_wear_the_envelope(url: str) -> None:
    for response, status in ((httpx.get(f"{url}/v2/else"), 404), (httpx.get(f"{url}/v1/chat/completions"), 405)):
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert response.headers["x-request-id"]
    assert response.headers["allow"] == "POST"
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


def test_a_fault_of_the_server_is_a_500_with_the_envelope_and_an_id() -> None:
    with serving(ScriptedBackend([ValueError("a secret path")])) as url:
        response = post(url)
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert "secret" not in response.text
        assert response.headers["x-request-id"].startswith("req_")
        assert response.headers["x-should-retry"] == "false"


def test_an_error_inside_a_stream_reaches_the_client() -> None:
    with serving(ScriptedBackend(["Go", ServingError("The model process was ended by SIGKILL")])) as url:
        stream = client(url).chat.completions.create(model="tiny", messages=HELLO, stream=True)  # type: ignore[call-overload]
        with pytest.raises(openai.APIError, match="SIGKILL"):
            list(stream)
        assert "[DONE]" not in post(url, stream=True).text
        assert post(url).status_code == 503


def test_the_key() -> None:
    with serving(ScriptedBackend(), api_key="s3cret") as url:
        assert client(url, "s3cret").chat.completions.create(model="tiny", messages=HELLO).choices  # type: ignore[arg-type]
        with pytest.raises(openai.AuthenticationError) as caught:
            client(url, "other").models.list()
        assert caught.value.code == "invalid_api_key"
        assert caught.value.request_id
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/v1/models", headers={"api-key": "s3cret"}).status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200


def test_without_a_key_only_loopback_names_are_answered(url: str) -> None:
    port = url.rpartition(":")[2]
    for host, status in ((f"localhost:{port}", 200), ("[::1]", 200), ("evil.example", 403), (f"192.168.0.7:{port}", 403)):
        assert httpx.get(f"{url}/v1/models", headers={"host": host}).status_code == status, host


# --- clients that go away --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_request(stream: bool) -> None:
    backend = ScriptedBackend(["Once", 30.0, "never sent"])
    with serving(backend) as url:
        with contextlib.suppress(httpx.TimeoutException), httpx.Client(timeout=0.5) as impatient:
            impatient.post(f"{url}/v1/chat/completions", json={"model": "tiny", "messages": HELLO, "stream": stream, "n": 2})
        assert eventually(lambda: backend.num_closed_early == 2)


# --- the socket to the model process ----------------------------------------------------------------------------------------------


class ScriptedProcess:
    """Listens as a model process does; `reply` gives the records for each record that arrives, None closes the line."""

    def __init__(self, address: SocketAddress, reply: Callable[[dict[str, Any]], list[dict[str, Any]] | None]) -> None:
        self._listener, self.address = address.listen()
        self._reply = reply
        self.received: list[dict[str, Any]] = []
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        connection, _ = self._listener.accept()
        with self._listener, connection, connection.makefile("rb") as lines:
            for line in lines:
                self.received.append(json.loads(line))
                records = self._reply(self.received[-1])
                if records is None:
                    connection.shutdown(socket.SHUT_RDWR)
                    return
                for record in records:
                    connection.sendall(encode_line({"id": self.received[-1].get("id"), **record}))


def script(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    if record["op"] == "models":
        return [{"type": "models", "models": ENTRIES}]
    if record["op"] != "chat":
        return []
    if record["model"] == "deadly":
        return None
    if record["model"] == "nobody":
        error = ServingError("No such model", place="/home/someone/models").to_dict()
        return [{"type": "error", "error": error, "code": "model_not_found"}]
    started = {"type": "started", "fingerprint": "fp", "num_prompt_tokens": 2}
    if record["model"] == "slow":
        return [started]
    done = {"type": "done", "finish_reason": "length", "num_prompt_tokens": 2, "num_completion_tokens": 1}
    return [started, {"type": "delta", "text": "é"}, done]


def addresses(folder: Path) -> list[SocketAddress]:
    # The other kind of line is for systems without Unix sockets; it works everywhere, so it is tested everywhere.
    return [SocketAddress.fresh(folder), SocketAddress(host="127.0.0.1")]


@pytest.mark.parametrize("kind", [0, 1])
def test_the_socket_carries_many_requests_and_says_when_it_broke(tmp_path: Path, kind: int) -> None:
    process = ScriptedProcess(addresses(tmp_path)[kind], script)

    async def talk() -> None:
        backend = SocketBackend(str(process.address), "token", lambda: "The model process was ended by SIGKILL")
        await backend.open()
        call = {"messages": HELLO, "sampling": {}, "stop": [], "stream": True}
        assert await backend.models() == ENTRIES
        events = [event async for event in backend.chat({"model": "tiny", **call})]
        assert events == [Started("fp", 2), TextDelta("é"), Finished("length", 2, 1)]
        with pytest.raises(ApiError) as refused:
            [event async for event in backend.chat({"model": "nobody", **call})]
        assert (refused.value.status, refused.value.code) == (404, "model_not_found")
        assert "/home" not in str(refused.value)

        slow = backend.chat({"model": "slow", **call})
        assert await anext(slow) == Started("fp", 2)
        await slow.aclose()
        waiting = asyncio.ensure_future(anext(backend.chat({"model": "deadly", **call})))
        with pytest.raises(ServingError, match="SIGKILL"):
            await waiting
        with pytest.raises(ServingError, match="SIGKILL"):
            backend.check()
        with pytest.raises(ServingError, match="giong serve"):
            await backend.models()
        await backend.close()

    asyncio.run(talk())
    chats = {record["model"]: record["id"] for record in process.received if record["op"] == "chat"}
    assert process.received[0] == {"op": "hello", "token": "token"}
    assert {"op": "cancel", "id": chats["slow"]} in process.received
    assert sum(record["op"] == "cancel" for record in process.received) == 1


def test_requests_after_the_model_process_died_get_503_with_the_reason(tmp_path: Path) -> None:
    process = ScriptedProcess(SocketAddress.fresh(tmp_path), script)
    with serving(SocketBackend(str(process.address), why_gone=lambda: "The model process was ended by SIGKILL")) as url:
        assert post(url).json()["choices"][0]["message"]["content"] == "é"
        for model in ("deadly", "tiny"):
            response = post(url, model=model)
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "model_process_gone"
            assert "SIGKILL" in response.json()["error"]["message"]
            assert response.headers["x-should-retry"] == "false"
        assert httpx.get(f"{url}/health").status_code == 503


# --- the command line ------------------------------------------------------------------------------------------------------------


def test_a_taken_port_is_named_with_the_remedy() -> None:
    from giong.cli.serve import take_port

    with take_port("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        with pytest.raises(ResourceError, match=f"Port {port} is in use.*--port"):
            take_port("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"not-a-host\.invalid"):
        take_port("not-a-host.invalid", 0)


def test_other_hosts_than_loopback_need_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from giong.cli.serve import api_key
    from giong.config import ServeConfig

    monkeypatch.delenv("SOME_KEY", raising=False)
    assert api_key(ServeConfig()) is None
    assert api_key(ServeConfig(host="localhost")) is None
    with pytest.raises(ConfigError, match=r"Listening on 0\.0\.0\.0"):
        api_key(ServeConfig(host="0.0.0.0"))
    with pytest.raises(ConfigError, match="export SOME_KEY"):
        api_key(ServeConfig(api_key_env="SOME_KEY"))
    monkeypatch.setenv("SOME_KEY", "k")
    assert api_key(ServeConfig(host="0.0.0.0", api_key_env="SOME_KEY")) == "k"
