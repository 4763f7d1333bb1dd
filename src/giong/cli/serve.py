"""`giong serve`: an OpenAI-compatible endpoint for the base and every tuned model of a project.

The port is taken before the model is loaded, and held: half a minute of loading must not end in "port in use".
"""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from giong.errors import ConfigError, Interrupted, ResourceError

if TYPE_CHECKING:
    from giong.config import ServeConfig
    from giong.workspace import Project


EXAMPLES = {
    "generate": """\
  messages = [{{"role": "user", "content": "Hello"}}]
  print(client.chat.completions.create(model="{model}", messages=messages).choices[0].message.content)""",
    "embed": '  print(client.embeddings.create(model="{model}", input=["Hello"]).data[0].embedding)',
    "classify": '  print(client.post("/classify", body={{"model": "{model}", "input": ["Hello"]}}, cast_to=object))',
}
"""How a program asks, by the project's task."""


def serve(
    project: Annotated[Path | None, typer.Option("--project", "-p", help="The project folder; by default the one you are in.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. Any other than loopback needs a key.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Name of the environment variable with the key clients must send.")] = None,
) -> None:
    """Answer OpenAI-compatible requests with the base and every tuned model, chosen by name."""
    from giong import config as configuration
    from giong.server.model_process import ModelProcess
    from giong.workspace import Project

    found = Project.find(project or ".")
    config = configuration.load(found.config_path)
    given = {"host": host, "port": port, "api_key_env": api_key_env}
    settings = config.serve.model_copy(update={name: value for name, value in given.items() if value is not None})
    key = api_key(settings)
    listener = take_port(settings.host, settings.port)
    with listener, _terminated_as_interrupted(), ModelProcess(found.root, on_notice=_tell) as process:
        _tell(f"Loading {config.model.name_or_path} ...")
        try:
            ready = process.start()
        except KeyboardInterrupt:
            raise Interrupted("Stopped before the model was loaded") from None
        _tell(f"{ready['message']}.")
        _introduce(listener, settings, [entry["name"] for entry in ready["models"]], config.name, config.task)
        _run(listener, process, key, found)
    _tell("Stopped.")


def api_key(settings: ServeConfig) -> str | None:
    """The key that clients must send. Raises ConfigError where one is needed, or named, and not there."""
    from giong.server.app import is_loopback

    if settings.api_key_env:
        key = os.environ.get(settings.api_key_env, "")
        if not key:
            raise ConfigError(
                f"The environment variable {settings.api_key_env} with the server's key is not set", place="serve.api_key_env",
                remedy=f"Set it: export {settings.api_key_env}=...",
            )  # fmt: skip
        return key
    if not is_loopback(settings.host):
        raise ConfigError(
            f"Listening on {settings.host} lets others in, and there is no key", place="serve.host",
            remedy="Put a key into an environment variable and name it with --api-key-env, or listen on 127.0.0.1.",
        )  # fmt: skip
    return None


def take_port(host: str, port: int) -> socket.socket:
    """A socket bound to the address. Raises ResourceError naming the port where it is taken, ConfigError for an unknown host."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, UnicodeError):
        raise ConfigError(
            f"{host!r} is not an address of this machine", place="serve.host", remedy="Use 127.0.0.1 or an address of yours."
        ) from None
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Without a listener behind it, a second server could bind the same port during the loading.
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ResourceError(
                f"Port {port} is in use", place=host, remedy="Choose another with --port, or --port 0 for a free one."
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise ResourceError(
                f"No permission to listen on port {port}", place=host, remedy="Choose one above 1023 with --port."
            ) from None
        raise ConfigError(
            f"Cannot listen on {host!r}: {error.strerror}", place="serve.host", remedy="Use 127.0.0.1 or an address of yours."
        ) from None
    return listener


def _introduce(listener: socket.socket, settings: ServeConfig, models: list[str], project_name: str, task: str) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    base_url = f"http://{host}:{listener.getsockname()[1]}/v1"
    example = project_name if project_name in models else models[-1]
    key = f'os.environ["{settings.api_key_env}"]' if settings.api_key_env else '"local"'
    _tell(f"Serving at {base_url} (stop with Ctrl-C). Models: {', '.join(models)}. Pages: {base_url.removesuffix('v1')}")
    _tell(f'  client = openai.OpenAI(base_url="{base_url}", api_key={key})')
    _tell(EXAMPLES[task].format(model=example))


def _run(listener: socket.socket, process: object, key: str | None, project: Project) -> None:
    import uvicorn

    from giong.server.app import create_app
    from giong.server.backend import SocketBackend
    from giong.server.model_process import ModelProcess

    assert isinstance(process, ModelProcess)
    app = create_app(SocketBackend(process.address, process.token, process.why_gone), key, project)
    settings = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=3)
    try:
        uvicorn.Server(settings).run(sockets=[listener])
    except KeyboardInterrupt:
        # The way a server is meant to end; uvicorn has let the answers under way finish and raises it again.
        return


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends the server as Ctrl-C does: the model process is stopped and the socket's folder removed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _tell(text: str) -> None:
    typer.echo(text, err=True)
