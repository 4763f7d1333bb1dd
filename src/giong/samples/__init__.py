"""The sample data that ships with giong: an author, other voices on the same topics, and general text.

All of it was written for the project (CC0), except the general text, which is read at run time from the documentation
inside the Python installation, so that nothing need be bundled for the forgetting gate.
"""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

AUTHOR_PATH = Path(str(files("giong.samples").joinpath("author.jsonl")))
"""Rows of `document_id`, `passage` (from 1), `title`, `date`, `text`, `neutral_rewrite`."""
BACKGROUND_PATH = Path(str(files("giong.samples").joinpath("background.jsonl")))
"""Rows of `voice`, `document_id`, `text`."""


def author_rows() -> list[dict]:
    """The sample author's passages with their recorded neutral rewrites, by document and passage."""
    return [json.loads(line) for line in AUTHOR_PATH.read_text(encoding="utf-8").splitlines()]


def background_voices() -> dict[str, list[str]]:
    """Passages of eight other plain writers on the same topics, by voice."""
    voices: dict[str, list[str]] = {}
    for line in BACKGROUND_PATH.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        voices.setdefault(row["voice"], []).append(row["text"])
    return voices


def general_texts(max_characters: int = 40_000, characters_per_text: int = 1_500) -> list[str]:
    """English prose from Python's own help texts, for measuring what a tuned model forgets; always the same selection."""
    from pydoc_data.topics import topics

    texts: list[str] = []
    total = 0
    for name in sorted(topics):
        paragraphs = [
            " ".join(paragraph.split())
            for paragraph in topics[name].split("\n\n")
            # Grammar, code and tables are indented or full of signs; prose begins at the margin with a capital.
            if re.match(r"[A-Z][a-z]+ ", paragraph) and "::" not in paragraph and len(paragraph) > 200
        ]
        text = "\n\n".join(paragraphs)[:characters_per_text]
        if len(text) > 400:
            texts.append(text)
            total += len(text)
        if total >= max_characters:
            break
    return texts
