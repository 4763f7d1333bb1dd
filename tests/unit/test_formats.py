"""Structured answers and words beyond the answer, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from giong.config import parse
from giong.config.json_schema import read_schema, schema_of
from giong.contracts import Example, Message
from giong.data.conversations import parse_conversation
from giong.errors import ConfigError
from giong.evaluation.formats import Format, asks_for_json
from giong.evaluation.gates import surplus
from giong.evaluation.metrics.talk import assistant_talk, words_beyond

CALLS = [f'{{"name": "{tool}", "arguments": {{"n": {n}}}}}' for tool, n in (("add", 1), ("sub", 2), ("add", 3), ("mul", 4))]


PRICE = {
    "type": "object", "required": ["price"], "additionalProperties": False,
    "properties": {"price": {"type": "number", "minimum": 0}, "until": {"type": "string", "format": "date"}},
}  # fmt: skip
WRAPPED = {"type": "json_schema", "json_schema": {"name": "offer", "strict": True, "schema": PRICE}}


def asked(answers: list[str], *schemas: dict | None) -> list[Example]:
    given = [*schemas, *[None] * len(answers)]
    return [Example(f"r{n}", "d", "k", (Message("user", "?"),), answer, json_schema=given[n]) for n, answer in enumerate(answers)]


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
    gate = Format(asked(CALLS[:1])).gate([reply])
    assert gate.status == ("fail" if fault else "pass")
    assert fault in gate.explanation


def test_share_of_valid_replies_and_of_the_right_tool():
    gate = Format(asked(CALLS)).gate([CALLS[0], CALLS[0], CALLS[2], "no"])
    assert gate.value == 0.75
    assert gate.interval.low < 0.75 < gate.interval.high
    assert "3 of 4 replies are valid" in gate.explanation
    assert "Not valid: r3: no JSON." in gate.explanation
    assert "2 of 4 call the author's tool" in gate.explanation


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ('{"price": 3, "until": "2026-11-26"}', ""),
        ('{"price": 3, "until": "soon"}', "'soon' is not a 'date' (at $.until)"),
        ('{"price": -1}', "-1 is less than the minimum of 0 (at $.price)"),
        ('{"price": NaN}', "no JSON"),
        ("{}", "'price' is a required property (at $)"),
        ('{"price": 1, "why": 1}', "'why' was unexpected"),
        ("3", "3 is not of type 'object'"),
        ("It costs 3.", "no JSON"),
        (json.dumps({"price": "x" * 500}), "is not of type 'number' (at $.price)"),
    ],
)
def test_a_reply_is_held_to_the_schema(reply, reason):
    gate = Format(asked(["prose of the author's"]), PRICE).gate([reply])
    assert gate.status == ("fail" if reason else "pass")
    assert gate.threshold_text == "at least 95% of the replies are valid by their JSON schema"
    assert reason in gate.explanation
    assert len(gate.explanation) < 250


def test_a_rows_own_schema_comes_before_the_common_one_and_the_first_faults_are_named():
    examples = asked(["a"] * 40, {"type": "integer"}, {})
    gate = Format(examples, PRICE).gate(["1", "[]", *['{"price": 1}'] * 33, *["1"] * 5])
    assert gate.value == 35 / 40
    assert gate.interval.low < 35 / 40 < gate.interval.high
    assert "35 of 40 replies are valid. Not valid: r35: 1 is not of type 'object' (at $); r36:" in gate.explanation
    assert "r37" in gate.explanation and "r38" not in gate.explanation and "and 2 more." in gate.explanation
    # Without a common schema the other rows are held to the author's shape where he writes JSON, and to nothing where he does not.
    mixed = Format(asked(["1", CALLS[0], CALLS[1]], {"type": "integer"}))
    assert mixed.gate(["2", CALLS[1], "{}"]).value == 2 / 3
    assert "schema or are JSON with the keys" in mixed.gate(["2", CALLS[1], "{}"]).threshold_text
    assert Format(asked(["1", "prose", "prose"], {"type": "integer"})).gate(["2", "x", "y"]).value == 1
    assert not Format(asked(["prose"]))


@pytest.mark.parametrize(
    ("schema", "part"),
    [
        ({"type": "objekt"}, r"not a valid JSON schema: 'objekt' is not valid under any of the given schemas \(at \$.type\)"),
        ({"properties": {"a": {"pattern": "("}}}, "is not a 'regex'"),
        ({"$ref": "https://example.org/offer.json"}, "refers to 'https://example.org/offer.json', which is not in it"),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}}, "refers to '/\\$defs/none'|refers to '#/\\$defs/none'"),
        ({"type": "json_schema", "json_schema": {"name": "offer"}}, "a JSON schema is an object, not None"),
    ],
)
def test_a_wrong_schema_is_refused_when_the_settings_are_read(schema, part, tmp_path: Path):
    with pytest.raises(ConfigError, match=part) as caught:
        parse({"evaluation": {"json_schema": schema}})
    assert caught.value.place == "evaluation.json_schema"
    (tmp_path / "offer.json").write_text(json.dumps(schema))
    with pytest.raises(ConfigError, match="'offer.json' is no JSON schema: "):
        read_schema("offer.json", tmp_path)


def test_schemas_come_from_the_settings_a_file_or_openais_wrapping(tmp_path: Path):
    assert parse({"evaluation": {"json_schema": WRAPPED}}).evaluation.json_schema == PRICE
    (tmp_path / "offer.json").write_text(json.dumps(PRICE))
    assert read_schema("offer.json", tmp_path) == read_schema(PRICE, tmp_path) == PRICE
    assert read_schema(None, tmp_path) is None
    tree = {"$id": "https://example.org/tree", "$ref": "#/$defs/node", "$defs": {"node": {"items": {"$ref": "#/$defs/node"}}}}
    assert schema_of(tree) == tree
    for text in ("{", "[]"):
        (tmp_path / "offer.json").write_text(text)
        with pytest.raises(ConfigError, match="is no JSON schema"):
            read_schema("offer.json", tmp_path)
    with pytest.raises(ConfigError, match="No such file"):
        read_schema("none.json", tmp_path)


def test_rows_of_a_chat_file_bring_their_schema(monkeypatch):
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "{}"}], "response_format": WRAPPED}

    def read(**changes):
        conversation, note = parse_conversation(json.dumps({**row, **changes}), "c", "/c:1")
        return conversation.json_schema, note

    assert read() == (PRICE, "")
    assert read(response_format={"type": "json_object"}) == ({"type": "object"}, "")
    assert read(response_format={"type": "text"}) == (None, "not used: response_format")
    with pytest.raises(ValueError, match="response_format: not a valid JSON schema"):
        read(response_format={"type": "json_schema", "json_schema": {"schema": {"type": 3}}})
    monkeypatch.setattr("giong.data.conversations.find_spec", lambda name: None)
    assert read() == (None, "not used: response_format")


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
