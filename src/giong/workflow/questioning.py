"""The question set of `data.questions` within a story: base and tuned model, from memory and with passages of the documents."""

from __future__ import annotations

from typing import TYPE_CHECKING

from giong.baselines.lookup import Lookup
from giong.contracts import Message, Request, Sampling
from giong.evaluation.questions import FactScores, Question, read_questions, score_answers
from giong.evaluation.results import TUNED
from giong.workflow.story import Story

if TYPE_CHECKING:
    from giong.generation.local import LocalModel

LOOKUP = "+lookup"
"""What the name of an arm with passages ends with."""
MAX_ANSWER_TOKENS = 80


def questions_of(story: Story) -> list[Question]:
    """The question set; none where none is named. Raises DataError for a file that is not one."""
    path = story.config.data.questions
    return read_questions(story.project.root / path) if path else []


def ask_questions(story: Story, questions: list[Question], local: LocalModel, adapter: str | None) -> dict[str, FactScores]:
    """Scores of one model, without passages and with them; greedy."""
    if not questions:
        return {}
    name = "base" if local is story.local and adapter is None else TUNED
    predictor = local.predictor(name, adapter, Sampling(max_new_tokens=MAX_ANSWER_TOKENS))
    lookup = Lookup(
        predictor, story.passages, story.config.baselines.num_shots, count_tokens=local.loaded.chat.count_tokens,
        max_prompt_tokens=local.loaded.max_seq_length - MAX_ANSWER_TOKENS,
    )  # fmt: skip
    requests = [Request(question.id, (Message("user", question.question),)) for question in questions]
    plain = predictor.predict(requests, story.progress("eval", f"questions, {name}"))
    looked_up = lookup.predict(requests, story.progress("eval", f"questions with passages, {name}"))
    shown = [lookup.shown_by_request[question.id] for question in questions]
    return {name: score_answers(questions, plain), f"{name}{LOOKUP}": score_answers(questions, looked_up, shown)}
