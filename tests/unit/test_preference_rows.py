"""Rows from preferences: what carries loss, which rows belong together, what is left out."""

from __future__ import annotations

from collections.abc import Callable

from giong.contracts import Message, Preference, Rating
from giong.models.preference_rows import preference_rows, rating_rows


def ask(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def test_a_pair_is_two_rows_side_by_side(tiny_model: Callable):
    loaded = tiny_model("qwen2")
    pairs = [Preference("a", ask("Who?"), "Me.", "It was me.", 2.0), Preference("b", ask("Why?"), "So.", "Because of the rain. " * 40)]
    rows, report = preference_rows(loaded.chat, 64, pairs)
    assert [(row.name, row.group, row.extras["sign_R"], row.extras["margin_R"]) for row in rows] == [
        ("a chosen", 0, 1.0, 2.0), ("a rejected", 0, -1.0, 2.0),
    ]  # fmt: skip
    assert (report.too_long, report.num_rows) == (["b"], 2)
    for row, answer in zip(rows, ("Me.", "It was me.")):
        assert loaded.chat.decode(row.input_ids[row.weights > 0].tolist()) == answer
        assert row.input_ids[-1] in loaded.chat.end_token_ids and row.weights[-1] == 1


def test_a_rating_stands_beside_the_answer_to_another_request(tiny_model: Callable):
    loaded = tiny_model("qwen2")
    ratings = [Rating("a", ask("Who?"), "Me.", True), Rating("b", ask("Who?"), "You.", False), Rating("c", ask("Why?"), "So.", True)]
    rows, _ = rating_rows(loaded.chat, 64, ratings)
    told = [(row.group, row.extras["sign_R"], loaded.chat.decode(row.input_ids[row.weights > 0].tolist())) for row in rows]
    # "You." answers the same question as "Me.", so it is no stranger to it.
    assert told == [(0, 1.0, "Me."), (0, 0.0, "So."), (1, -1.0, "You."), (1, 0.0, "So."), (2, 1.0, "So."), (2, 0.0, "Me.")]
