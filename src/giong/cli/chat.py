"""`giong chat`: talk to a model in the terminal, or pipe one request in and get the answer on standard output.

It starts a model process of its own and speaks to it directly, so that no server need run and no port be free.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from giong.errors import ConfigError, DataError, GiongError, Interrupted

if TYPE_CHECKING:
    import asyncio

HELP = "/model NAME switches, /models lists, /new forgets the conversation, /quit ends."


def chat(
    model: Annotated[
        str | None, typer.Argument(help="Name of a model, as `giong ls` shows it; by default the project's tuned model.")
    ] = None,
    project: Annotated[Path | None, typer.Option("--project", "-p", help="The project folder; by default the one you are in.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; by default what is saved with the model.", min=0, max=2)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer in tokens.", min=1)] = None,
) -> None:
    """Talk to a model by name; with a pipe on standard input, answer that one request."""
    import asyncio

    from giong import config as configuration
    from giong.server.backend import SocketBackend
    from giong.server.model_process import ModelProcess
    from giong.workspace import Project

    found = Project.find(project or ".")
    config = configuration.load(found.config_path)
    interactive = sys.stdin.isatty()
    request = "" if interactive else sys.stdin.read().strip()
    if not interactive and not request:
        raise DataError("There is no request on standard input", remedy='Give one: echo "Hello" | giong chat')
    sampling = {"temperature": temperature, "max_new_tokens": max_tokens}
    with ModelProcess(found.root, on_notice=_tell) as process:
        if interactive:
            _tell(f"Loading {config.model.name_or_path} ...")
        try:
            ready = process.start()
        except KeyboardInterrupt:
            raise Interrupted("Stopped before the model was loaded") from None
        with asyncio.Runner() as runner:
            backend = SocketBackend(process.address, process.token, process.why_gone)
            runner.run(backend.open())
            name = choose(model, [entry["name"] for entry in ready["models"]], config.name)
            conversation = Conversation(backend, name, system, {key: value for key, value in sampling.items() if value is not None})
            try:
                if interactive:
                    _tell(f"{ready['message']}.\nTalking to {name}. {HELP}")
                    _talk(runner, conversation)
                else:
                    runner.run(conversation.ask(request, _show))
                    print()
            finally:
                runner.run(backend.close())


def choose(asked: str | None, names: list[str], project_name: str) -> str:
    """The model to talk to. Raises ConfigError for a name that is not served. `names` has the base first."""
    if asked is None:
        return project_name if project_name in names else names[-1]
    if asked not in names:
        raise ConfigError(f"There is no model {asked!r}", remedy=f"There are: {', '.join(names)}.")
    return asked


class Conversation:
    """The turns so far with one model."""

    def __init__(self, backend: Any, model: str, system: str | None, sampling: dict[str, Any]) -> None:
        self._backend, self._sampling = backend, sampling
        self.model = model
        self._opening = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict[str, str]] = []

    async def ask(self, text: str, show: Callable[[str], None]) -> str:
        """Send a turn and show the answer as it comes; both are remembered once the answer is complete."""
        from giong.server.backend import TextDelta

        turns = [*self._turns, {"role": "user", "content": text}]
        call = {"model": self.model, "messages": [*self._opening, *turns], "sampling": self._sampling, "stop": [], "stream": True}
        answer = ""
        async for event in self._backend.chat(call):
            if isinstance(event, TextDelta):
                show(event.text)
                answer += event.text
        self._turns = [*turns, {"role": "assistant", "content": answer}]
        return answer

    async def models(self) -> list[str]:
        return [entry["name"] for entry in await self._backend.models()]

    def forget(self) -> None:
        self._turns = []


def _talk(runner: asyncio.Runner, conversation: Conversation) -> None:
    """Read lines until the end of input; Ctrl-C ends an answer, and at the prompt the conversation."""
    while True:
        try:
            line = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line in ("/quit", "/exit"):
            return
        try:
            if line.startswith("/"):
                _command(runner, conversation, line)
            elif line:
                runner.run(conversation.ask(line, _show))
                print()
        except KeyboardInterrupt:
            print(" ...")
        except GiongError as error:
            _tell(str(error))


def _command(runner: asyncio.Runner, conversation: Conversation, line: str) -> None:
    verb, _, name = line.partition(" ")
    if verb == "/models":
        _tell(", ".join(runner.run(conversation.models())))
    elif verb == "/model" and name.strip():
        # Asked anew each time, so that a model that was just trained can be chosen.
        conversation.model = choose(name.strip(), runner.run(conversation.models()), "")
        _tell(f"Talking to {conversation.model}.")
    elif verb == "/new":
        conversation.forget()
        _tell("Forgotten.")
    else:
        _tell(HELP)


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _tell(text: str) -> None:
    typer.echo(text, err=True)
