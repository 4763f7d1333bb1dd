"""`giong compare`: judge pairs of answers blindly, in the terminal or on a page; then `results` and `export`.

Pairs and questions go to standard error, like every message: standard output holds results alone.
"""

from __future__ import annotations

import getpass
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from giong.cli.options import ProjectOption
from giong.errors import ConfigError
from giong.workspace import Project

if TYPE_CHECKING:
    from giong.evaluation.compare import Comparison, Results
    from giong.evaluation.compare.pairs import Pair

app = typer.Typer(help="Judge pairs of answers without knowing who wrote them.", rich_markup_mode=None)
KEYS = {"1": "left", "l": "left", "2": "right", "r": "right", "0": "tie", "t": "tie", "=": "tie"}


@app.callback(invoke_without_command=True)
def compare(
    context: typer.Context,
    project: ProjectOption = None,
    arms: Annotated[
        str | None,
        typer.Option(help="Arms as the evaluation names them, and `author`.", show_default="fine_tuned, the best prompt and author"),
    ] = None,
    mode: Annotated[str, typer.Option(help="preference: which is better; author: which one the author wrote.")] = "preference",
    rater: Annotated[str | None, typer.Option(help="Your name.", show_default="your name on this machine")] = None,
    num_pairs: Annotated[int | None, typer.Option(help="Pairs that a rater is shown.", min=1, show_default="all")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of order and sides.", show_default="evaluation.seed")] = None,
    language: Annotated[str | None, typer.Option(help="en or vi.", show_default="from the environment")] = None,
    agree: Annotated[bool, typer.Option("--agree", help="The rater has read the consent text and agrees.")] = False,
    page: Annotated[bool, typer.Option("--page", help="Serve a page on this machine instead; raters give their names there.")] = False,
    port: Annotated[int, typer.Option(help="Port of the page; 0 takes a free one.", min=0, max=65535)] = 8010,
) -> None:
    """Judge pairs of answers without knowing who wrote them; running again goes on where you stopped."""
    if context.invoked_subcommand:
        # Said before the subcommand, it is meant for it.
        context.obj = project
        return
    found = Project.find(project or ".")
    named = [arm.strip() for arm in arms.split(",") if arm.strip()] if arms else None
    _answer_missing(found, named or ())
    from giong.project import compare as begin

    comparison = begin(found, named, mode=mode, seed=seed, num_pairs=num_pairs)  # type: ignore[arg-type]
    if comparison.num_equal:
        _tell(f"{comparison.num_equal} pairs have the same text on both sides and are not shown.")
    if page:
        _serve(comparison, port)
    else:
        _judge(comparison, rater or getpass.getuser(), _language(language), agree)


@app.command()
def results(
    context: typer.Context, project: ProjectOption = None, as_json: Annotated[bool, typer.Option("--json", help="For tools.")] = False
) -> None:
    """Win rates, strengths, agreement of the raters, and how often the author was recognised."""
    from giong.evaluation.compare import vote_results

    found = vote_results(Project.find(project or context.obj or "."))
    if as_json:
        typer.echo(json.dumps(found.to_dict(), ensure_ascii=False, indent=1))
    else:
        show_votes(found)


@app.command()
def export(
    context: typer.Context,
    to: Annotated[Path, typer.Option("--to", help="File to write, one JSON object a line.")],
    project: ProjectOption = None,
    with_raters: Annotated[bool, typer.Option("--with-raters", help="Add who voted, when and how.")] = False,
) -> None:
    """Write the votes as preference pairs (prompt, chosen, rejected) as TRL reads them."""
    from giong.evaluation.compare import export_preferences

    done = export_preferences(Project.find(project or context.obj or "."), to, with_raters=with_raters)
    left_out = {
        "ties": done.num_ties, "pairs that raters are divided on": done.num_divided, "pairs whose chosen answer is empty": done.num_empty,
        "votes on who the author is": done.num_author_votes,
    }  # fmt: skip
    named = ", ".join(f"{count} {what}" for what, count in left_out.items() if count)
    _tell(f"{done.num_pairs} preference pairs{f'; left out: {named}' if named else ''}.")
    _tell("They come from the frozen test side: a model that is trained on them has to be tested on other documents.")
    typer.echo(done.path)


def _language(asked: str | None) -> str:
    from giong.evaluation.compare.words import WORDS

    if asked is None:
        return "vi" if os.environ.get("LC_ALL", os.environ.get("LANG", "")).startswith("vi") else "en"
    if asked not in WORDS:
        raise ConfigError(f"There is no language {asked!r}", place="--language", remedy=f"Languages: {', '.join(WORDS)}.")
    return asked


def _answer_missing(project: Project, arms: Sequence[str]) -> None:
    """Let arms that were asked for, and have not answered yet, answer now."""
    from giong.cli.story import perform
    from giong.config import load
    from giong.evaluation.results import TUNED

    missing = [arm for arm in arms if not project.arm_path(arm).is_file()]
    steps = ["baseline"] if set(missing) & set(load(project.config_path).baselines.arms) else []
    steps += ["eval"] if TUNED in missing else []
    if steps:
        perform(project.root, steps)


def _judge(comparison: Comparison, rater: str, language: str, agree: bool) -> None:
    """Show pair after pair and read a key for each; the end of the input and Ctrl-C stop, and nothing is lost."""
    from rich.console import Console

    from giong.evaluation.compare.words import words_for

    console = Console(stderr=True, highlight=False)
    words = words_for(language, comparison.mode, comparison.author)
    total, remaining = len(comparison.all_for(rater)), comparison.remaining(rater)
    if remaining and not agree:
        console.print(words["consent"], markup=False)
        if not typer.confirm(words["agree"], err=True):
            raise typer.Exit(1)
    # Those judged in this sitting: what "back" returns to.
    judged: list[Pair] = []
    try:
        while remaining:
            _show_pair(console, words, remaining[0], total - len(remaining) + 1, total)
            key = _read_key(console, words["prompt"])
            if key in ("q", ""):
                return _tell(f"{total - len(remaining)}/{total}")
            if key == "b" and judged:
                remaining.insert(0, judged.pop())
            elif key in KEYS:
                comparison.vote(remaining[0], KEYS[key], rater=rater, consent=words["consent"])
                judged.append(remaining.pop(0))
    except KeyboardInterrupt:
        return _tell(f"\n{total - len(remaining)}/{total}")
    _tell(words["done"])
    _tell("giong compare results")


def _read_key(console: Any, prompt: str) -> str:
    """What was typed, in small letters; empty at the end of the input."""
    while True:
        console.print(prompt, end="", markup=False)
        line = sys.stdin.readline()
        if not line or line.strip():
            return line.strip().lower()


def _show_pair(console: Any, words: dict[str, str], pair: Pair, number: int, total: int) -> None:
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.text import Text

    from giong.contracts import request_text

    position = words["position"].format(number=number, total=total)
    console.print()
    console.print(Panel(Text(request_text(pair.messages)), title=f"{words['request']}, {position}", style="dim"))
    width = console.width // 2 - 1 if console.width >= 80 else console.width
    titles = f"1: {words['left']}", f"2: {words['right']}"
    console.print(
        Columns([Panel(Text(text.strip() or words["empty"]), title=title, width=width) for title, text in zip(titles, pair.texts)])
    )
    console.print(words["question"], style="bold", markup=False)


def show_votes(found: Results) -> None:
    """The figures of the votes as tables on standard output."""
    from rich.console import Console
    from rich.table import Table

    from giong.evaluation.report.opinions import vote_tables

    console = Console(width=None if Console().is_terminal else 150, highlight=False)
    tables = vote_tables(found.to_dict())
    for table in tables["tables"]:
        shown = Table(*table["header"], title=table["title"], title_justify="left")
        for row in table["rows"]:
            shown.add_row(*row)
        console.print(shown)
    for sentence in tables["sentences"]:
        console.print(sentence, markup=False)


def _serve(comparison: Comparison, port: int) -> None:
    import uvicorn

    from giong.cli.serve import take_port
    from giong.server.app import create_compare_app

    with take_port("127.0.0.1", port) as listener:
        settings = uvicorn.Config(create_compare_app(comparison), log_level="warning", access_log=False, server_header=False)
        _tell(f"Compare at http://127.0.0.1:{listener.getsockname()[1]}/compare (stop with Ctrl-C)")
        try:
            uvicorn.Server(settings).run(sockets=[listener])
        except KeyboardInterrupt:
            _tell("Stopped.")


def _tell(text: str) -> None:
    typer.echo(text, err=True)
