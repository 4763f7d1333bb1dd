"""Training rows from preferences: one row for each answer, the rows of a pair side by side.

Both rows of a pair repeat the request. A shared prefix would save its tokens once, and cost an attention mask of its own and a
second layout to be proved equal; the answers, not the requests, are what is long here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from giong.contracts import Message, Preference, Rating
from giong.models.chat_template import ChatFormat
from giong.models.rows import Row, RowReport, count_rows, encode_items


def preference_rows(chat: ChatFormat, max_seq_length: int, preferences: Sequence[Preference]) -> tuple[list[Row], RowReport]:
    """The chosen and the rejected answer of each pair, with loss on the answer and its end-of-turn token.

    `sign_R` is 1 for chosen and -1 for rejected; `margin_R` is the pair's. A pair of which one answer does not fit into
    `max_seq_length` is left out and named.
    """
    asked = [(pair.messages, answer) for pair in preferences for answer in (pair.chosen, pair.rejected)]
    encoded = _encoded(chat, asked)
    report, rows = RowReport(), []
    for number, (pair, both) in enumerate(zip(preferences, zip(encoded[::2], encoded[1::2]))):
        if max(len(ids) for ids, _ in both) > max_seq_length:
            report.too_long.append(pair.id)
            continue
        for side, sign, (ids, weights) in zip(("chosen", "rejected"), (1.0, -1.0), both):
            rows.append(Row(ids, weights, f"{pair.id} {side}", group=number, extras={"sign_R": sign, "margin_R": pair.margin}))
    return rows, count_rows(rows, report)


def rating_rows(chat: ChatFormat, max_seq_length: int, ratings: Sequence[Rating]) -> tuple[list[Row], RowReport]:
    """Each rated answer (`sign_R` 1 where it is wanted, else -1), and beside it, in its group, the same request with the answer to the next
    other request (`sign_R` 0), by which `kto` measures how far the model has moved.

    A rating that does not fit into `max_seq_length` is left out and named; a stranger's answer that does not is left out.
    """
    requests = [rating.messages for rating in ratings]
    strangers = [
        next(
            (
                ratings[(number + step) % len(ratings)].answer
                for step in range(1, len(ratings))
                if requests[(number + step) % len(ratings)] != asked
            ),
            None,
        )
        for number, asked in enumerate(requests)
    ]
    own = _encoded(chat, [(rating.messages, rating.answer) for rating in ratings])
    foreign = _encoded(chat, [(rating.messages, answer or rating.answer) for rating, answer in zip(ratings, strangers)])
    report, rows = RowReport(), []
    for number, (rating, stranger) in enumerate(zip(ratings, strangers)):
        if len(own[number][0]) > max_seq_length:
            report.too_long.append(rating.id)
            continue
        rows.append(Row(*own[number], rating.id, group=number, extras={"sign_R": 1.0 if rating.label else -1.0}))
        if stranger is not None and len(foreign[number][0]) <= max_seq_length:
            rows.append(Row(*foreign[number], f"{rating.id} beside another answer", group=number, extras={"sign_R": 0.0}))
    return rows, count_rows(rows, report)


def _encoded(chat: ChatFormat, asked: Sequence[tuple[Sequence[Message], str]]) -> list[tuple[np.ndarray, np.ndarray]]:
    def encode(chat: ChatFormat, item: tuple[Sequence[Message], str]) -> list[tuple[np.ndarray, np.ndarray]]:
        encoded = chat.encode(*item)
        return [(encoded.input_ids, encoded.weights)]

    return [parts[0] for parts in encode_items(chat, asked, encode)]
