"""Structured answers and words beyond the answer, by hand."""

from __future__ import annotations

import pytest

from giong.evaluation.formats import asks_for_json, valid_format
from giong.evaluation.gates import surplus
from giong.evaluation.metrics.talk import assistant_talk, words_beyond

CALLS = [f'{{"name": "{tool}", "arguments": {{"n": {n}}}}}' for tool, n in (("add", 1), ("sub", 2), ("add", 3), ("mul", 4))]


def test_json_is_asked_for_where_the_author_writes_it():
    assert asks_for_json(CALLS)
    assert asks_for_json([*CALLS, "prose", "prose"])
    assert not asks_for_json(["5", '"text"', "prose", "{broken"])


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        ('{"name": "add", "arguments": {"n": 1.5}}', ""),
        ('Here you are: {"name": "add", "arguments": {}}', "no JSON"),
        ('```json\n{"name": "add", "arguments": {}}\n```', "no JSON"),
        ("", "no JSON"),
        ("[" * 20_000, "no JSON"),
        ('["add"]', "another kind"),
        ('{"name": "add"}', "without 'arguments'"),
        ('{"name": "add", "arguments": {}, "why": 1}', "unknown key 'why'"),
        ('{"name": 7, "arguments": {}}', "wrong type of 'name'"),
    ],
)
def test_a_reply_is_held_to_the_shape_of_the_authors_answers(reply, fault):
    gate = valid_format([reply], CALLS[:1])
    assert gate.status == ("fail" if fault else "pass")
    assert fault in gate.explanation


def test_share_of_valid_replies_and_of_the_right_tool():
    gate = valid_format([CALLS[0], CALLS[0], CALLS[2], "no"], CALLS)
    assert gate.value == 0.75
    assert gate.interval.low < 0.75 < gate.interval.high
    assert "3 of 4 replies are valid" in gate.explanation
    assert "2 of 4 call the author's tool" in gate.explanation


@pytest.mark.parametrize(
    ("text", "num_words"),
    [
        ("The kettle came back.\nUser: and the lid?\nAssistant: gone", 6),
        ("Done.<|im_end|><|im_start|>user more words", 3),
        ("He said: user: that is me, and the user was pleased.", 0),
        ("The kettle came back from the harbour. The kettle came back from the harbour again", 8),
        ("我们昨天一起去河内的老街。我们昨天一起去河内的老街吃饭", 7),
        ("", 0),
        ("one", 0),
    ],
)
def test_words_beyond_the_answer(text, num_words):
    assert words_beyond(text) == num_words


def test_an_assistants_phrases_count_where_the_author_has_none():
    assert assistant_talk("Sure, here is the text:\nIt rained.")
    assert assistant_talk("It rained. Let me know if you need more.")
    assert assistant_talk("Dưới đây là bản viết lại: Trời mưa.")
    assert not assistant_talk("Here is where we lived, sure enough. I hope it rains.")
    good, chatty = ["It rained."] * 40, ["Certainly! It rained."]
    assert surplus([*good, *chatty], good).status == "pass"
    assert surplus([*good, *chatty * 2], good).status == "fail"
    assert surplus([*good, *chatty * 2], [*good, *chatty]).status == "pass"
