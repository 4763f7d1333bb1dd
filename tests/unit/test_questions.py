"""The question set and the arm that looks things up: known answers, citations, bad files, and what the verdict makes of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from report_content import content
from test_report import page
from test_verdict import GOOD, WEAK

from giong.baselines.lookup import Lookup
from giong.contracts import Message, Passage, Reply, Request
from giong.errors import DataError
from giong.evaluation.questions import Question, read_questions, score_answers
from giong.evaluation.results import finite
from giong.sizing.interval import Interval
from giong.sizing.verdict import decide

TEXTS = ("The mill at Brindle had 212 looms.", "Ada Lunt put up the mill at Corwick in 1804.", "Bread is best on the second day.")
PASSAGES = [Passage(f"p{index}", "d", index, text) for index, text in enumerate(TEXTS)]
QUESTIONS = [
    Question("q1", "How many looms had the mill at Brindle?", ("212", "two hundred and twelve")),
    Question("q2", "Who built Corwick?", ("Ada Lunt",)),
]


class Reader:
    """Answers with the first passage that it is shown, and cites it."""

    name = "reader"

    def predict(self, requests, on_progress=None):
        return [Reply(request.messages[-1].content.split("\n")[0].removeprefix("[1] ") + " [1]") for request in requests]


def requests() -> list[Request]:
    return [Request(question.id, (Message("user", question.question),)) for question in QUESTIONS]


def test_what_is_looked_up_is_found_answered_and_cited() -> None:
    arm = Lookup(Reader(), PASSAGES, 2)
    replies = arm.predict(requests())
    shown = [arm.shown_by_request[question.id] for question in QUESTIONS]
    assert [passages[0].id for passages in shown] == ["p0", "p1"] and all(len(passages) == 2 for passages in shown)
    scores = score_answers(QUESTIONS, replies, shown)
    assert (scores.correct.point, scores.found.point, scores.cited.point) == (1, 1, 1)
    # Of seven words one is the answer: F1 2/8; of ten words two: 4/12.
    assert scores.f1 == pytest.approx((2 / 8 + 4 / 12) / 2)


def test_each_part_can_fail_by_itself() -> None:
    shown = [[PASSAGES[2], PASSAGES[0]], [PASSAGES[2]]]
    right = [Reply("It had 212. [1]"), Reply("By ADA  lunt!")]
    scores = score_answers(QUESTIONS, right, shown)
    # The wrong passage is cited, none is cited, and the second question's passage was not among them.
    assert (scores.correct.point, scores.cited.point, scores.found.point) == (1, 0, 0.5)
    # Number 212 of a citation is no answer, nor is a part of a number.
    wrong = score_answers(QUESTIONS, [Reply("[212] I do not know, 2120 perhaps."), Reply("Lunt, Ada")])
    assert (wrong.correct.point, wrong.found, wrong.cited) == (0, None, None)
    assert wrong.f1 == pytest.approx(0.5)


def test_passages_that_do_not_fit_are_left_out() -> None:
    arm = Lookup(Reader(), PASSAGES, 3, count_tokens=lambda messages: len(messages[0].content.split()), max_prompt_tokens=50)
    arm.prompt(requests()[0])
    assert [passage.id for passage in arm.shown_by_request["q1"]] == ["p0", "p1"]


def test_questions_are_read_and_bad_lines_named(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "Who?", "answer": "Ada"}\n\n{"question": "When?", "answer": ["1804", "in 1804"]}\n')
    assert [(question.id, question.answers) for question in read_questions(path)] == [("q1", ("Ada",)), ("q3", ("1804", "in 1804"))]
    for text, message in (
        ('{"question": "Who?"}', "no question with its answer"), ("Who? Ada", "no question with"), ('{"question": " ", "answer": "a"}', "is empty"),
        ('{"question": "Who?", "answer": "..."}', "is empty"), ('{"question": "Who?", "answer": []}', "is empty"), ("", "no questions in this file"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(DataError, match=message) as caught:
            read_questions(path)
        assert str(path) in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        read_questions(tmp_path / "missing.jsonl")


ANSWERED = {
    "base": Interval(0.05, 0.0, 0.2), "fine_tuned": Interval(0.1, 0.03, 0.25), "base+lookup": Interval(0.8, 0.6, 0.9),
    "fine_tuned+lookup": Interval(0.6, 0.4, 0.75),
}  # fmt: skip


def test_the_verdict_has_the_looking_up_beside_the_tuned_model() -> None:
    facts = decide(dataclasses.replace(WEAK, answered=ANSWERED))
    assert facts.decision == "retrieve"
    assert "80% [60% to 90%] of the questions are answered (base+lookup), by the tuned model from memory 10%" in facts.reason
    voice = decide(dataclasses.replace(GOOD, answered=ANSWERED))
    assert voice.decision == "combine" and "62%" in voice.reason
    # Passages that help no one prove nothing, nor does a lead within the intervals.
    for changed in (
        {"base+lookup": Interval(0.1, 0.02, 0.3), "fine_tuned+lookup": Interval(0.1, 0.02, 0.3)},
        {"fine_tuned": Interval(0.5, 0.3, 0.7)},
    ):
        assert decide(dataclasses.replace(GOOD, answered={**ANSWERED, **changed})).decision == "go"


def test_the_report_shows_both() -> None:
    scores = {
        "fine_tuned": score_answers(QUESTIONS, [Reply("212"), Reply("?")]),
        "base+lookup": score_answers(QUESTIONS, [Reply("212 [1]"), Reply("?")], [PASSAGES[:1]] * 2),
    }
    words = page(facts=finite({name: dataclasses.asdict(row) for name, row in scores.items()})).one_line()
    assert "tuned, from memory 50%" in words and "base, with passages 50%" in words
    assert "What is known" not in page(**{"facts": content().facts}).one_line()
