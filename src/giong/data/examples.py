"""Requests with the author's answers as they lie on disk, and which of them an evaluation asks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from giong.contracts import Example, Message
from giong.workspace import read_jsonl


def read_examples(path: Path) -> list[Example]:
    """The rows of `data/examples.jsonl`."""
    return [Example(**{**row, "messages": tuple(Message(**message) for message in row["messages"])}) for row in read_jsonl(path)]


def frozen_test(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """The frozen test requests, at most `limit`, spread evenly over the documents."""
    test = [example for example in examples if example.side == "test"]
    return test if limit is None or limit >= len(test) else spread(test, limit)


def spread(examples: Sequence[Example], limit: int) -> list[Example]:
    """At most `limit` examples, taken in turns from each document, in their original order."""
    by_document: dict[str, list[Example]] = {}
    for example in examples:
        by_document.setdefault(example.document_id, []).append(example)
    taken: set[str] = set()
    for turn in range(max(len(group) for group in by_document.values())):
        for group in by_document.values():
            if turn < len(group) and len(taken) < limit:
                taken.add(group[turn].id)
    return [example for example in examples if example.id in taken]
