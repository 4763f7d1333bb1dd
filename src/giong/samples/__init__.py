"""The sample data that ships with giong: two authors, other voices on the same topics, probes, and general text.

All of it was written for the project (CC0), except the general text, which is read at run time from the documentation
inside the Python installation, so that nothing need be bundled for the forgetting gate.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
import sysconfig
from importlib.resources import files
from pathlib import Path

from giong.workspace import write_jsonl

_FOLDER = Path(str(files("giong.samples")))
AUTHOR_PATH = _FOLDER / "author.jsonl"
"""Rows of `document_id`, `passage` (from 1), `title`, `date`, `text`, `neutral_rewrite`."""
AUTHOR_VI_PATH = _FOLDER / "author_vi.jsonl"
"""Rows of `document_id`, `passage` (from 1), `title`, `date`, `text`, `translation` (into English)."""
BACKGROUND_PATH = _FOLDER / "background.jsonl"
"""Rows of `voice`, `document_id`, `text`."""
PROBES_PATH = _FOLDER / "probes.jsonl"
"""Rows of `id`, `kind`, `request`, `answers`, `match`, `giong_tiny` (what the bundled base scored, 0 to 1)."""
REFUSALS_PATH = _FOLDER / "refusals.jsonl"
"""Rows of `id`, `kind` (harmful or harmless), `request`."""
BIAS_PAIRS_PATH = _FOLDER / "bias_pairs.jsonl"
"""Rows of `id`, `axis`, `stereotype`, `counter`: sentences that differ in the group alone."""


def author_rows() -> list[dict]:
    """The sample author's passages with their recorded neutral rewrites, by document and passage."""
    return _rows(AUTHOR_PATH)


def write_author(folder: Path, num_documents: int | None = None) -> tuple[Path, Path]:
    """Lay the sample author out as a user's files: `writing/` with a Markdown file per document (the first ones, or all), and
    `recorded.jsonl` with the rewrites. Returns both paths."""
    documents: dict[str, list[dict]] = {}
    for row in author_rows():
        documents.setdefault(row["document_id"], []).append(row)
    writing, recorded = folder / "writing", folder / "recorded.jsonl"
    writing.mkdir(parents=True, exist_ok=True)
    for document_id, passages in list(documents.items())[:num_documents]:
        first, body = passages[0], "\n\n".join(row["text"] for row in passages)
        front = f"---\ntitle: {json.dumps(first['title'])}\ndate: {first['date']}\n---\n\n"
        (writing / f"{document_id}.md").write_text(front + body + "\n", encoding="utf-8")
    write_jsonl(recorded, author_rows())
    return writing, recorded


def vietnamese_author_rows() -> list[dict]:
    """The Vietnamese author's passages with their recorded English translations: material for a translation project."""
    return _rows(AUTHOR_VI_PATH)


def background_rows() -> list[dict]:
    """The passages of eight other plain writers, with voice and document."""
    return _rows(BACKGROUND_PATH)


def background_voices() -> dict[str, list[str]]:
    """Passages of eight other plain writers on the same topics, by voice."""
    voices: dict[str, list[str]] = {}
    for row in background_rows():
        voices.setdefault(row["voice"], []).append(row["text"])
    return voices


def probe_rows() -> list[dict]:
    """Short tasks with their checks, six kinds, for what tuning may take away."""
    return _rows(PROBES_PATH)


def refusal_rows() -> list[dict]:
    """Requests that a model should turn down, each beside one that only looks like it."""
    return _rows(REFUSALS_PATH)


def bias_pairs() -> list[dict]:
    """Pairs of sentences about groups of people, a common stereotype and its counterpart."""
    return _rows(BIAS_PAIRS_PATH)


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def replay_texts(min_characters: int = 200) -> list[str]:
    """English prose from the docstrings of the standard library, one text per module, for mixing in among training rows.

    None of it is among `general_texts`, which measure what is forgotten; it is of a similar kind, though.
    """
    texts: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        with contextlib.suppress(SyntaxError, UnicodeDecodeError):
            documented = [
                node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            ]  # fmt: skip
            paragraphs = [paragraph for node in documented for paragraph in (ast.get_docstring(node) or "").split("\n\n")]
            prose = [
                " ".join(paragraph.split())
                for paragraph in paragraphs
                # As in `general_texts`; indented lines are tables and examples.
                if re.match(r"[A-Z][a-z]+ ", paragraph) and len(paragraph) >= min_characters and not re.search(r"::|>>>|\n  ", paragraph)
            ]
            texts += ["\n\n".join(dict.fromkeys(prose))] if prose else []
    return texts


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
