"""Pairs of answers to the same request, and the order in which a rater meets them.

Order and sides are hashes of seed, rater and pair, not draws of a generator: they are the same however often the rater stops and
whatever else was voted on, and neither more arms nor more raters change them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, get_args

from giong.contracts import Example, Message
from giong.evaluation.results import AUTHOR
from giong.workspace import content_hash

Mode = Literal["preference", "author"]
"""`preference` asks which answer is better, `author` which one the author wrote."""
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one request. `id` is a hash of all of it: it changes with any text, and does not tell who wrote what."""

    id: str
    request_id: str
    document_id: str
    messages: tuple[Message, ...]
    arms: tuple[str, str]
    texts: tuple[str, str]

    def swapped(self) -> Pair:
        """The same pair with its sides exchanged."""
        return Pair(self.id, self.request_id, self.document_id, self.messages, self.arms[::-1], self.texts[::-1])


def make_pairs(test: Sequence[Example], answers: Mapping[str, Sequence[str]], mode: Mode) -> tuple[list[Pair], int]:
    """Every pair of arms on every request (in mode `author` those with the author), and how many were left out.

    `answers[arm]` has one text per request. Two equal texts cannot be told apart, so that pair is left out.
    """
    pairs, num_equal = [], 0
    for arms in combinations(answers, 2):
        if mode == "author" and AUTHOR not in arms:
            continue
        for index, example in enumerate(test):
            texts = (answers[arms[0]][index], answers[arms[1]][index])
            if texts[0].strip() == texts[1].strip():
                num_equal += 1
                continue
            identity = content_hash(example.id, list(example.messages), sorted(zip(arms, texts)))
            pairs.append(Pair(identity, example.id, example.document_id, example.messages, arms, texts))
    return pairs, num_equal


def in_order(pairs: Sequence[Pair], rater: str, mode: Mode, seed: int) -> list[Pair]:
    """The pairs as this rater meets them, left and right at random.

    Every request comes once before any comes again. In mode `author` none comes again: the text that returns would be known as
    the author's.
    """

    def draw(*what: str) -> str:
        return content_hash(seed, mode, rater, *what)

    rounds: dict[str, list[Pair]] = {}
    for pair in sorted(pairs, key=lambda pair: draw("pair", pair.id)):
        rounds.setdefault(pair.request_id, []).append(pair)
    most = 1 if mode == "author" else max((len(group) for group in rounds.values()), default=0)
    requests = sorted(rounds, key=lambda request: draw("request", request))
    ordered = [rounds[request][turn] for turn in range(most) for request in requests if turn < len(rounds[request])]
    return [pair.swapped() if int(draw("side", pair.id), 16) % 2 else pair for pair in ordered]
