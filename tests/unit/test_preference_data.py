"""Preference files: every spelling gives the same pair, and every bad row is named by its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from giong.config import parse
from giong.contracts import Example, Message, Preference, Rating
from giong.data.examples import frozen_test
from giong.data.preferences import has_pairs, hold_out, read_preferences, read_ratings
from giong.errors import DataError

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
GOOD, BAD = [{"role": "assistant", "content": "Me."}], [{"role": "assistant", "content": "It was me who."}]
EXPECTED = Preference("line 1", (Message("system", "Be brief."), Message("user", "Who?")), "Me.", "It was me who.")


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"input": {"messages": ASKED}, "preferred_output": GOOD, "non_preferred_output": BAD},
        {"input": {"messages": ASKED, "tools": []}, "preferred_completion": GOOD, "non_preferred_completion": BAD},
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
        {"prompt": ASKED, "chosen": "Me.", "rejected": "It was me who."},
        {"chosen": ASKED + GOOD, "rejected": ASKED + BAD},
        {
            "prompt": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Who?"}]}],
            "chosen": GOOD[0], "rejected": BAD[0],
        },
    ],
)  # fmt: skip
def test_every_spelling_is_the_same_pair(row: dict, tmp_path: Path):
    assert read_preferences(write(tmp_path, row)) == [EXPECTED]


def test_texts_that_say_who_speaks(tmp_path: Path):
    request = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Who?\n\nAssistant:"
    turns = (Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "Who?"))
    rows = (
        {"chosen": f"{request} Me.", "rejected": f"{request} It was me who."},
        {"prompt": request, "chosen": "Me.", "rejected": "No.", "margin": 2},
    )
    path = write(tmp_path, *rows)
    assert read_preferences(path) == [
        Preference("line 1", turns, "Me.", "It was me who."), Preference("line 2", turns, "Me.", "No.", 2.0),
    ]  # fmt: skip


def test_a_byte_order_mark_empty_lines_and_ids(tmp_path: Path):
    path = write(tmp_path, "", {"id": "a7", "prompt": "Who?", "chosen": "Me.", "rejected": "You."})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [pair.id for pair in read_preferences(path)] == ["a7"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Who?", "chosen": "Me.", "rejected": " Me.\n"}, "the two answers are equal"),
        ({"chosen": ASKED + GOOD, "rejected": ASKED + GOOD}, "the two answers are equal"),
        ({"prompt": "Who?", "chosen": "Me."}, "`rejected` is missing"),
        ({"prompt": "Who?", "chosen": "Me.", "rejected": ""}, "`rejected` is empty"),
        ({"prompt": "Who?", "chosen": [{"role": "assistant", "content": " "}], "rejected": "x"}, "`chosen` is empty"),
        ({"chosen": "Me.", "rejected": "You."}, "no request"),
        ({"prompt": ASKED + GOOD, "chosen": "Me.", "rejected": "You."}, "the request ends with the assistant's turn"),
        ({"prompt": "Who?", "chosen": GOOD + BAD, "rejected": "You."}, "must be one turn of the assistant"),
        ({"prompt": "Who?", "chosen": [{"role": "tool", "content": "x"}], "rejected": "You."}, "the role 'tool'"),
        ({"input": {"messages": ASKED, "tools": [{}]}, "preferred_output": GOOD, "non_preferred_output": BAD}, "tools"),
        ({"prompt": "Who?", "completion": "Me.", "label": True}, "kto"),
        ({"text": "Me."}, "no pair of answers: it has text"),
        ({"prompt": "Who?", "chosen": "Me.", "rejected": "You.", "margin": -1}, "margin -1"),
        ("[1]", "not a JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_a_bad_row_is_named_by_its_line(row: Any, reason: str, tmp_path: Path):
    path = write(tmp_path, {"prompt": "Who?", "chosen": "Me.", "rejected": "You."}, "", row)
    with pytest.raises(DataError) as caught:
        read_preferences(path)
    assert f"line 3: {reason}" in caught.value.message or reason in caught.value.message
    assert caught.value.place == f"{path}:3"


def test_all_bad_rows_are_named_at_once(tmp_path: Path):
    path = write(tmp_path, *[{"prompt": "Who?", "chosen": "Me.", "rejected": "Me."}] * 8)
    with pytest.raises(DataError, match="8 preference rows cannot be used: line 1: .*line 5: the two answers are equal; and lines 6, 7, 8"):
        read_preferences(path)


def test_no_file_and_an_empty_one(tmp_path: Path):
    with pytest.raises(DataError, match="no preference file"):
        read_preferences(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is empty"):
        read_preferences(write(tmp_path))


def test_ratings_and_pairs_that_are_taken_for_two(tmp_path: Path):
    rows = ({"prompt": "Who?", "completion": GOOD, "label": False}, {"prompt": "Who?", "chosen": "Me.", "rejected": "You."})
    asked = (Message("user", "Who?"),)
    assert read_ratings(write(tmp_path, *rows)) == [
        Rating("line 1", asked, "Me.", False), Rating("line 2 chosen", asked, "Me.", True), Rating("line 2 rejected", asked, "You.", False),
    ]  # fmt: skip


@pytest.mark.parametrize(("label", "reason"), [(0.5, "label 0.5"), ("yes", "label 'yes'"), (None, "label None"), (2, "label 2")])
def test_a_label_out_of_range(label: Any, reason: str, tmp_path: Path):
    with pytest.raises(DataError, match=f"line 1: {reason}"):
        read_ratings(write(tmp_path, {"prompt": "Who?", "completion": "Me.", "label": label}))


def test_ratings_of_one_label_teach_nothing(tmp_path: Path):
    with pytest.raises(DataError, match="Every answer has the label true"):
        read_ratings(write(tmp_path, *[{"prompt": "Who?", "completion": "Me.", "label": 1}] * 2))


def test_held_out_requests_are_asked_on_one_side_alone():
    items = [Preference(str(n), (Message("user", f"request {n // 3}"),), "a", "b") for n in range(30)]
    sides = hold_out(items, 0.2, 0)
    assert len(sides["calibration"]) == 6
    assert sorted(item.id for side in sides.values() for item in side) == sorted(item.id for item in items)
    assert not {item.messages for item in sides["train"]} & {item.messages for item in sides["calibration"]}
    assert hold_out(items, 0.2, 0) == sides
    with pytest.raises(DataError, match="on one request"):
        hold_out(items[:3], 0.2, 0)


def test_documents_that_were_voted_on_are_left_out_of_the_test(tmp_path: Path):
    def example(name: str, document: str, side: str = "test") -> Example:
        return Example(name, document, "neutral_rewrite", (Message("user", f"Write {name}."),), "text", side)

    examples = [example("a", "one"), example("b", "one"), example("c", "two"), example("d", "three", "train")]
    write(tmp_path, {"prompt": "Write a.", "chosen": "Yes.", "rejected": "No."}, {"prompt": "Write d.", "completion": "x", "label": True})
    for excluded, expected in ((False, "abc"), (True, "c")):
        config = parse({"data": {"preferences": "pairs.jsonl"}, "evaluation": {"exclude_preferences": excluded}})
        assert "".join(one.id for one in frozen_test(examples, config, tmp_path)) == expected
    write(tmp_path, *({"prompt": f"Write {name}.", "chosen": "Yes.", "rejected": "No."} for name in "bc"))
    with pytest.raises(DataError, match="The preferences ask about every test document"):
        frozen_test(examples, config, tmp_path)


def test_the_first_row_tells_pairs_from_ratings(tmp_path: Path):
    assert has_pairs(write(tmp_path, "", {"prompt": "Who?", "chosen": "Me.", "rejected": "You."}))
    assert not has_pairs(write(tmp_path, {"prompt": "Who?", "completion": "Me.", "label": True}))
    assert not has_pairs(write(tmp_path, "torn {")) and not has_pairs(write(tmp_path)) and not has_pairs(tmp_path / "nothing")
