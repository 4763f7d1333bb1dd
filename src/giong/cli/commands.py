"""The verbs of the command line as one typer application."""

from __future__ import annotations

import os
from collections.abc import Callable

import typer

from giong.cli import adapters, advise, chat, compare, demo, doctor, init, journal, manage, methods, serve, story, sweep

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo.demo,
    "init": init.init,
    "run": story.run,
    "import": story.import_,
    "synth": story.synth,
    "baseline": story.baseline,
    "size": story.size,
    "train": story.train,
    "sweep": sweep.sweep,
    "compare-methods": methods.compare_methods,
    "eval": story.eval_,
    "report": story.report,
    "advise": advise.advise,
    "export": story.export,
    "chat": chat.chat,
    "serve": serve.serve,
    "ls": manage.ls,
    "delete": manage.delete,
    "doctor": doctor.doctor,
}

app = typer.Typer(
    name="giong", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Make a language model write like you, and know in numbers whether fine-tuning is worth it.",
    epilog="Errors are one sentence; set --debug (before the verb) for the traceback.",
)  # fmt: skip
for verb, function in COMMANDS.items():
    app.command(verb)(function)
app.add_typer(compare.app, name="compare")
app.add_typer(adapters.app, name="adapters")
app.add_typer(journal.app, name="journal")

# Typer may bring a click of its own, so the error of a wrong command line is found through the one class of it that typer names.
USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]


@app.callback(invoke_without_command=True)
def _options(context: typer.Context, debug: bool = typer.Option(False, "--debug", help="Show tracebacks.")) -> None:
    if debug:
        os.environ["GIONG_DEBUG"] = "1"
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)
