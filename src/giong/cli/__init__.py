"""The command line. Data goes to standard output, messages to standard error; exit codes are those of giong.errors.

0 done   1 unexpected   2 settings   3 data   4 model   5 teacher   6 spend cap   7 machine   8 serving   9 order of steps   130 interrupted

The verbs are imported inside `main`, so that Ctrl-C during the imports ends in a sentence too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from giong.errors import ConfigError, GiongError, Interrupted


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; every error is one sentence on standard error."""
    try:
        return _run(sys.argv[1:] if argv is None else list(argv))
    except GiongError as error:
        return _say(error)
    except KeyboardInterrupt as error:
        return _say(Interrupted("Stopped", remedy="Run the same command again to go on."), error)
    except OSError as error:
        from giong.workspace import refusal

        return _say(refusal(error, str(error.filename or "")), error)
    except Exception as error:
        # Nothing is swallowed: this is the last place before the user, who gets a sentence instead of a traceback.
        return _say(GiongError(f"Unexpected {type(error).__name__}: {error}", remedy="Run `giong --debug ...` to see where."), error)


def _run(arguments: list[str]) -> int:
    import typer

    from giong.cli.commands import USAGE_ERROR, app

    try:
        code = app(arguments, prog_name="giong", standalone_mode=False) or 0
    except USAGE_ERROR as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "giong")
        raise ConfigError(error.format_message(), remedy=f"See `{command} --help`.") from None  # type: ignore[attr-defined]
    except typer.Abort as error:
        if isinstance(error.__cause__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        typer.echo(err=True)
        raise GiongError("There was no answer to the question", remedy="Answer it beforehand with --yes.") from None
    # Typer turns Ctrl-C into an exit code, without a word.
    if code == Interrupted.exit_code:
        raise KeyboardInterrupt
    return code


def _say(error: GiongError, cause: BaseException | None = None) -> int:
    """Print one sentence (with --debug after the traceback) and return the exit code."""
    if os.environ.get("GIONG_DEBUG"):
        import traceback

        traceback.print_exception(cause or error)
    print(f"giong: {' '.join(str(error).split())}", file=sys.stderr)
    return error.exit_code
