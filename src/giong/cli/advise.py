"""`giong advise`: what no figure shows is asked, written into giong.yaml, and the verdict given again."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from giong.cli.options import ProjectOption
from giong.workspace import Project

ANSWERS = {
    "y": True,
    "yes": True,
    "true": True,
    "có": True,
    "co": True,
    "n": False,
    "no": False,
    "false": False,
    "không": False,
    "khong": False,
}


def advise(
    project: ProjectOption = None,
    language: Annotated[str, typer.Option(help="Language of the questions: en or vi.")] = "en",
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=ANSWER", show_default=False,
            help="An answer instead of a question: goals=voice,facts, must_cite=yes, human_hours=8; may be given several times.",
        ),
    ] = None,
    ask: Annotated[bool | None, typer.Option("--ask/--no-ask", help="Ask what is not given.", show_default="where a person types")] = None,
) -> None:  # fmt: skip
    """Answer what cannot be measured (licence, consent, sources, hours); answers go into giong.yaml, section advice."""
    from giong.config import load
    from giong.errors import ConfigError
    from giong.evaluation.decision import decide_again, write_answers
    from giong.sizing.questions import QUESTIONS

    if language not in ("en", "vi"):
        raise ConfigError(f"There are no questions in {language!r}", place="--language", remedy="Choose en or vi.")
    found = Project.find(project or ".")
    config = load(found.config_path)
    given = dict(_assignment(text, list(QUESTIONS)) for text in assignments or ())
    if ask or (ask is None and not given and sys.stdin.isatty()):
        for name, question in QUESTIONS.items():
            if name not in given:
                _ask(name, question.prompt(language), getattr(config.advice, name), given)
    if given:
        write_answers(found, given)
        typer.echo(f"written to {found.config_path}", err=True)
    _show(decide_again(found, load(found.config_path)), decide_again(found, load(found.config_path), language), language)


def _assignment(text: str, names: list[str]) -> tuple[str, Any]:
    from giong.errors import ConfigError

    name, equals, answer = text.partition("=")
    name = name.strip().removeprefix("advice.")
    if not equals or name not in names:
        raise ConfigError(f"{text!r} is no answer", place="--set", remedy=f"Write NAME=ANSWER; names: {', '.join(names)}.")
    return name, _value(name, answer)


def _value(name: str, answer: str) -> Any:
    """The answer as section `advice` has it. Raises ConfigError for one that it does not take."""
    from giong.config import parse

    answer = answer.strip()
    value: Any = answer
    if name == "goals":
        value = [part.strip() for part in answer.split(",") if part.strip()]
    elif answer.lower() in ANSWERS and name not in ("knowledge_changes", "human_hours"):
        value = ANSWERS[answer.lower()]
    return getattr(parse({"advice": {name: value}}).advice, name)


def _ask(name: str, text: str, present: Any, given: dict[str, Any]) -> None:
    """Ask until the answer can be used; Enter leaves what there is."""
    from giong.errors import ConfigError

    shown = ", ".join(present) if isinstance(present, list) else {True: "yes", False: "no", None: ""}.get(present, f"{present}")
    while answer := typer.prompt(text, default=shown, show_default=bool(shown), prompt_suffix=" ", err=True).strip():
        if answer == shown:
            return
        try:
            given[name] = _value(name, answer)
        except ConfigError as error:
            typer.echo(str(error), err=True)
            continue
        return


def _show(verdict: Any, worded: Any, language: str) -> None:
    from giong.sizing.questions import QUESTIONS

    if verdict is None:
        typer.echo("The answers count as soon as there is an evaluation. Next: giong run", err=True)
        return
    typer.echo(f"{verdict.decision}: {worded.reason}")
    if verdict.answer:
        typer.echo(f"({QUESTIONS[verdict.answer].text[language]})")
    for caution in worded.cautions:
        typer.echo(f"- {caution}")
