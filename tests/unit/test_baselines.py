"""The prompting arms: what each puts into the request, and what it leaves out where there is no room."""

from __future__ import annotations

import pytest

from giong.baselines import BASELINES
from giong.baselines.few_shot import choose_shots
from giong.baselines.named_style import FALLBACK_STYLE_NAME, clean_name
from giong.baselines.prompt import describe
from giong.config import BaselinesConfig
from giong.contracts import Example, Message, Predictor, Reply, Request, Sampling


class Echo:
    """Answers with a fixed text and keeps what it was asked."""

    name = "echo"

    def __init__(self, answer: str = "ok") -> None:
        self.answer, self.asked = answer, []

    def predict(self, requests, on_progress=None):
        self.asked += requests
        if on_progress:
            on_progress(len(requests), len(requests))
        return [Reply(self.answer) for _ in requests]


def row(name: str, document: str, request: str, answer: str, system: str = "") -> Example:
    opening = (Message("system", system),) if system else ()
    return Example(name, document, "neutral_rewrite", (*opening, Message("user", request)), answer)


TRAIN = [
    row("a", "d1", "a kettle boils on the stove", "Kettles! They boil, they do.", system="Rewrite."),
    row("b", "d1", "a ladder leans on the wall", "Ladders! They lean, they really always do.", system="Rewrite."),
    row("c", "d2", "the violin was out of tune", "Violins! Out of tune, they are.", system="Rewrite."),
    row("d", "d3", "the harbour froze in winter", "Harbours! They freeze, and that's that.", system="Rewrite."),
    row("e", "d4", "a kettle and a violin met", "So they met! The kettle, the violin.", system="Rewrite."),
]
REQUEST = Request("r1", (Message("system", "Rewrite."), Message("user", "the old violin is broken")), Sampling(temperature=0.7))


def count_tokens(messages) -> int:
    return sum(len(turn.content.split()) for turn in messages)


def build(arm: str, echo: Echo, num_shots: int = 2, **settings) -> Predictor:
    return BASELINES[arm](echo, TRAIN, BaselinesConfig(num_shots=num_shots), **settings)


@pytest.mark.parametrize("arm", BASELINES)
def test_every_arm_is_a_predictor_that_keeps_the_request(arm):
    echo, seen = Echo(), []
    predictor = build(arm, echo)
    assert isinstance(predictor, Predictor)
    assert predictor.name == arm
    replies = predictor.predict([REQUEST, REQUEST], lambda done, total: seen.append((done, total)))
    assert len(replies) == 2
    assert seen == [(2, 2)]
    asked = echo.asked[-1]
    assert asked.id == "r1"
    assert asked.sampling == REQUEST.sampling
    assert asked.messages[-1] == REQUEST.messages[-1]
    assert [turn.role for turn in asked.messages].count("system") == 1
    assert asked.messages[0].content.startswith("Rewrite.")
    assert predictor.prompt(REQUEST) == asked


def test_base_sends_the_request_as_it_is():
    echo = Echo()
    build("base", echo).predict([REQUEST])
    assert echo.asked == [REQUEST]


def test_the_instruction_describes_without_quoting():
    echo = Echo()
    build("instruction", echo).predict([REQUEST])
    system = echo.asked[0].messages[0].content
    assert "exclamation marks" in system
    assert "no questions" in system
    assert not any(example.answer[:12] in system for example in TRAIN)
    assert describe(["One two three four. Five six!"]).startswith("sentences of about 3 words; frequent exclamation marks")
    assert describe([""]) == "plain sentences"


def test_few_shot_gives_every_request_the_same_prefix():
    echo = Echo()
    predictor = build("few_shot", echo, num_shots=3)
    predictor.predict([REQUEST, Request("r2", (Message("system", "Rewrite."), Message("user", "another")))])
    first, second = (asked.messages[:-1] for asked in echo.asked)
    assert first == second
    assert [turn.role for turn in first] == ["system", *["user", "assistant"] * 3]
    assert predictor.num_shots_used == 3


def test_shots_are_of_medium_length_and_from_different_documents():
    shots = choose_shots(TRAIN, 4)
    assert {shot.document_id for shot in shots} == {"d1", "d2", "d3", "d4"}
    # The answers have 28, 42, 31, 39 and 36 characters: of the two in d1, 42 is nearer to the median of 36 than 28 is.
    assert "b" in {shot.id for shot in shots}
    assert choose_shots(TRAIN, 4) == shots
    assert len(choose_shots(TRAIN, 99)) == 5
    assert choose_shots([], 2) == []
    twins = [*TRAIN, row("f", "d1", "asked otherwise", TRAIN[0].answer)]
    assert len(choose_shots(twins, 99)) == 5


def test_shots_that_do_not_fit_are_left_out_and_counted():
    echo = Echo()
    # Request 1 + 6, shot about 12: room for one shot only.
    predictor = build("few_shot", echo, num_shots=3, count_tokens=count_tokens, max_prompt_tokens=22)
    assert predictor.num_shots_used == 1
    predictor.predict([REQUEST])
    assert len(echo.asked[0].messages) == 4
    assert count_tokens(echo.asked[0].messages) <= 22
    long = Request("r3", (Message("user", "word " * 20),))
    predictor.predict([long])
    assert echo.asked[1] == long
    assert predictor.shots_by_request == {"r1": 1, "r3": 0}
    assert predictor.num_shots_used == 0


def test_retrieval_shows_the_most_similar_last():
    echo = Echo()
    build("retrieval", echo).predict([REQUEST])
    turns = echo.asked[0].messages
    assert [turn.content for turn in turns if turn.role == "user"] == [
        "a kettle and a violin met", "the violin was out of tune", "the old violin is broken",
    ]  # fmt: skip
    tight = build("retrieval", echo, count_tokens=count_tokens, max_prompt_tokens=20)
    tight.predict([REQUEST])
    assert echo.asked[1].messages[1].content == "the violin was out of tune"
    assert tight.num_shots_used == 1


def test_retrieval_in_a_script_without_spaces():
    train = [row("x", "d1", "我们去河内旅行", "河内好玩呢"), row("y", "d2", "他在学校教书", "教书累啊")]
    echo = Echo()
    arm = BASELINES["retrieval"](echo, train, BaselinesConfig(num_shots=1))
    arm.predict([Request("r", (Message("user", "下周去河内"),))])
    assert echo.asked[0].messages[0].content == "我们去河内旅行"


def test_named_style_asks_once_and_uses_the_name():
    echo = Echo("**Jane Austen**\nbecause of her irony")
    arm = build("named_style", echo)
    arm.predict([REQUEST])
    arm.predict([REQUEST])
    assert arm.style_name == "Jane Austen"
    assert not arm.style_name_is_fallback
    assert len(echo.asked) == 3
    assert "which well-known writer" in echo.asked[0].messages[0].content.lower()
    assert sum(example.answer in echo.asked[0].messages[0].content for example in TRAIN) == 3
    assert "style of Jane Austen" in echo.asked[1].messages[0].content


@pytest.mark.parametrize("answer", ["", "...", "I think that it comes nearest to one of the many writers of essays"])
def test_an_unusable_name_falls_back_and_says_so(answer):
    arm = build("named_style", Echo(answer))
    assert arm.style_name == FALLBACK_STYLE_NAME
    assert arm.style_name_is_fallback


def test_names_are_cleaned():
    assert clean_name("\n “Answer: Nguyễn Nhật Ánh.” ") == "Nguyễn Nhật Ánh"
    assert clean_name("- The New Yorker school") == "The New Yorker school"
