"""The advisor's questionnaire: GET /advise for the page, POST /advise/answers to write answers into giong.yaml.

Questions, validation, file and verdict are those of `giong advise`: the page is another way to type. Answers are sent as JSON, which no
other site's page can make a browser send here unasked.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ConfigDict

from giong.config import AdviceConfig, load
from giong.evaluation.decision import decide_again, write_answers
from giong.server import rendering
from giong.server.words import ADVISE
from giong.sizing.questions import QUESTIONS
from giong.workspace import Project

router = APIRouter()


class Sheet(BaseModel):
    """Answers, null where a question is left open; those that are not named stay as they are."""

    model_config = ConfigDict(extra="forbid")

    advice: AdviceConfig


@router.get("/advise")
def page(request: Request) -> HTMLResponse:
    """The questions with the answers of now, and the verdict."""
    words = {language: {**own, **_words(language)} for language, own in ADVISE.items()}
    return rendering.page(request, "advise", words, questions=QUESTIONS, state=_state(request.app.state.project))


@router.post("/advise/answers")
def answer(sheet: Sheet, request: Request) -> dict[str, Any]:
    """Write down what has changed; the verdict that follows."""
    project: Project = request.app.state.project
    before = load(project.config_path).advice
    write_answers(
        project, {name: value for name in sheet.advice.model_fields_set if (value := getattr(sheet.advice, name)) != getattr(before, name)}
    )
    return _state(project)


def _words(language: Any) -> dict[str, str]:
    found = {name: question.text[language] for name, question in QUESTIONS.items()}
    options = [(f"{name}.{option}", words[language]) for name, question in QUESTIONS.items() for option, words in question.options.items()]
    return found | dict(options)


def _state(project: Project) -> dict[str, Any]:
    """The answers, and the verdict in every language; None before an evaluation."""
    config = load(project.config_path)
    worded = {language: decide_again(project, config, language) for language in ADVISE}
    verdicts = {
        language: verdict and {name: getattr(verdict, name) for name in ("decision", "reason", "answer", "cautions")}
        for language, verdict in worded.items()
    }
    return {"advice": config.advice.model_dump(), "verdict": verdicts}
