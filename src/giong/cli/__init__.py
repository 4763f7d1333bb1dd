"""The command line. Data goes to standard output, messages to standard error; exit codes are those of giong.errors.

0 done   1 unexpected   2 settings   3 data   4 model   5 teacher   6 spend cap   7 machine   8 serving   9 order of steps   130 interrupted
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence

import typer

from giong.cli import chat, demo, doctor, init, manage, serve, story
from giong.errors import GiongError, Interrupted

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo.demo,
    "init": init.init,
    "run": story.run,
    "import": story.import_,
    "synth": story.synth,
    "baseline": story.baseline,
    "size": story.size,
    "train": story.train,
    "eval": story.eval_,
    "report": story.report,
    "export": story.export,
    "chat": chat.chat,
    "serve": serve.serve,
    "ls": manage.ls,
    "delete": manage.delete,
    "doctor": doctor.doctor,
}

app = typer.Typer(
    name="giong", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Make a language model write like you, and know in numbers whether fine-tuning is worth it.",
    epilog="Errors are one sentence; set --debug (before the verb) for the traceback.",
)  # fmt: skip
for verb, function in COMMANDS.items():
    app.command(verb)(function)


@app.callback()
def _options(debug: bool = typer.Option(False, "--debug", help="Show tracebacks.")) -> None:
    if debug:
        os.environ["GIONG_DEBUG"] = "1"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; every error of ours is one sentence on standard error and its exit code."""
    try:
        app(list(argv) if argv is not None else None, standalone_mode=True)
        return 0
    except GiongError as error:
        _say(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _say(Interrupted("Stopped", remedy="Run the same command again to go on."))
        sys.exit(Interrupted.exit_code)


def _say(error: GiongError) -> None:
    if os.environ.get("GIONG_DEBUG"):
        traceback.print_exception(error)
    print(f"giong: {error}", file=sys.stderr)
