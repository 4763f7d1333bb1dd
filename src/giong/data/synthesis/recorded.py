"""Replays a teacher's recorded answers from a .jsonl file: the demo's teacher, and anyone's who paid once.

A row is found by the text it was written for, else by document and passage number. Text comes first, because numbers move
when passages are cut at another length; where a row brings its text, a number alone is not believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from giong.contracts import Message, Passage, Reply, Sampling
from giong.data.cleaning import text_hash
from giong.data.synthesis.kinds import read_task
from giong.errors import DataError, TeacherError
from giong.workspace import read_jsonl


class Recorded:
    """A teacher that answers from a file: `document_id` and `passage` (from 1), or `text`, and one key per kind.

    A passage made of several recorded texts with blank lines between gets their answers joined in the same way.
    """

    name = "recorded"

    def __init__(self, path: Path, passages: Sequence[Passage] = ()) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError("There is no file of recorded answers", place=str(path), remedy="Correct synthesis.recorded.")
        self._by_text: dict[str, dict[str, object]] = {}
        by_number: dict[tuple[str, int], dict[str, object]] = {}
        for number, row in enumerate(read_jsonl(self.path), start=1):
            if isinstance(row.get("text"), str):
                self._by_text[text_hash(row["text"])] = row
            elif isinstance(row.get("document_id"), str) and isinstance(row.get("passage"), int):
                by_number[row["document_id"], row["passage"]] = row
            else:
                raise DataError(
                    "A recorded answer says neither for which `text` nor for which `document_id` and `passage` it is",
                    place=f"{self.path}:{number}", remedy="Add one of the two to that line.",
                )  # fmt: skip
        self._passage_ids = {text_hash(passage.text): passage.id for passage in passages}
        for passage in passages:
            row_at = by_number.get((passage.document_id, passage.index + 1))
            if row_at is not None:
                self._by_text.setdefault(text_hash(passage.text), row_at)

    def ask(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """The recorded answer. Raises TeacherError where there is none."""
        kind, text = read_task(messages)
        whole = self._answer(text, kind.name)
        parts = [whole] if whole else [self._answer(part, kind.name) for part in text.split("\n\n")]
        if not all(parts):
            passage = self._passage_ids.get(text_hash(text), " ".join(text.split())[:60])
            raise TeacherError(
                f"There is no recorded `{kind.name}` for {passage!r}",
                place=str(self.path),
                remedy="Record it, or use another synthesis.source.",
            )
        return Reply("\n\n".join(part for part in parts if part))

    def _answer(self, text: str, kind: str) -> str | None:
        answer = self._by_text.get(text_hash(text), {}).get(kind)
        return answer if isinstance(answer, str) and answer.strip() else None
