"""Requests with the author's answers as they lie on disk, and which of them an evaluation asks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from giong.config import ProjectConfig
from giong.contracts import Example, Message
from giong.data.preferences import asked_requests
from giong.errors import DataError
from giong.workspace import content_hash, read_jsonl


def read_examples(path: Path) -> list[Example]:
    """The rows of `data/examples.jsonl`."""
    return [Example(**{**row, "messages": tuple(Message(**message) for message in row["messages"])}) for row in read_jsonl(path)]


def frozen_test(examples: Sequence[Example], config: ProjectConfig, root: Path) -> list[Example]:
    """The frozen test requests, at most `evaluation.max_requests`, spread evenly over the documents; without those that preferences ask
    about, where `evaluation.exclude_preferences` says so. Raises DataError where none are left."""
    test, limit = [example for example in examples if example.side == "test"], config.evaluation.max_requests
    if config.data.preferences and config.evaluation.exclude_preferences:
        seen = asked_about(test, config, root)
        left = [example for example in test if example.document_id not in seen]
        if test and not left:
            raise DataError(
                "The preferences ask about every test document", place="evaluation.exclude_preferences",
                remedy="Set it to false, or learn from votes on some of the documents alone.",
            )  # fmt: skip
        test = left
    return test if limit is None or limit >= len(test) else spread(test, limit)


def asked_about(examples: Sequence[Example], config: ProjectConfig, root: Path) -> set[str]:
    """Documents of the examples whose requests `data.preferences` asks too."""
    asked = asked_requests(root / Path(config.data.preferences or "").expanduser())
    return {example.document_id for example in examples if content_hash(example.messages) in asked}


def spread(examples: Sequence[Example], limit: int) -> list[Example]:
    """At most `limit` examples, taken in turns from each document, in their original order."""
    by_document: dict[str, list[Example]] = {}
    for example in examples:
        by_document.setdefault(example.document_id, []).append(example)
    taken: set[str] = set()
    for turn in range(max(map(len, by_document.values()), default=0)):
        for group in by_document.values():
            if turn < len(group) and len(taken) < limit:
                taken.add(group[turn].id)
    return [example for example in examples if example.id in taken]
