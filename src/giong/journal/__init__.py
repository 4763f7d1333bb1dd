"""The project's journal: goal, plan, what was tried, what was learnt, what comes next; for people and for programs.

Two files say the same: `journal.jsonl`, appended to and never changed, and `JOURNAL.md`, whose marked blocks are made from it
anew. What a person writes in `JOURNAL.md` is kept wherever it stands. Attempts are not told to the journal by the steps one by
one: it looks at the records that they left, so a step that is skipped says nothing and a kill loses nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from giong.config import ProjectConfig
from giong.errors import ConfigError, DataError, StoryError
from giong.journal.entries import KINDS, Entry, failed_entry, found_entries, goal_entry, timestamp
from giong.journal.markdown import handwritten, merged
from giong.journal.summary import as_blocks, summary
from giong.workspace import Project, append_jsonl, atomic_write, mend_torn_end, read_jsonl

__all__ = ["KINDS", "Entry", "Journal"]


class Journal:
    """The journal of a project; everything is on disk."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.path = project.root / "JOURNAL.md"
        self.data_path = project.root / "journal.jsonl"

    def entries(self) -> list[Entry]:
        """All entries in the order of their writing. Raises DataError naming the line that is none."""
        if not self.data_path.is_file():
            return []
        mend_torn_end(self.data_path)
        rows = read_jsonl(self.data_path)
        try:
            return [Entry(**row) for row in rows]
        except TypeError as error:
            raise DataError(f"A line is no journal entry: {error}", place=str(self.data_path), remedy="Mend or delete it.") from None

    def markdown(self) -> str:
        """The text of JOURNAL.md. Raises StoryError before there is one, DataError where it is not UTF-8."""
        if not self.path.is_file():
            raise StoryError("There is no journal yet", place=str(self.project.root), remedy="Any step of `giong run` begins it.")
        try:
            return self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise DataError(
                "The journal is not UTF-8 text and is left as it is", place=str(self.path), remedy="Save it as UTF-8."
            ) from None

    def to_dict(self) -> dict[str, Any]:
        """The five parts, each a list, with `notes`, and as `handwritten` what stands in JOURNAL.md beside the blocks."""
        return {**summary(self.entries()), "handwritten": handwritten(self.markdown()) if self.path.is_file() else ""}

    def add(self, text: str, kind: str = "note") -> Entry:
        """Write a person's sentence into a part of the journal. Raises ConfigError for an unknown part and for no text."""
        if kind not in KINDS:
            raise ConfigError(f"The journal has no part {kind!r}", place="kind", remedy=f"Parts: {', '.join(KINDS)}.")
        if not text.strip():
            raise ConfigError("There is nothing to write", place="text", remedy='Say it: giong journal add "..."')
        entry = Entry(kind, text.strip(), timestamp(), by="person")
        self._write([entry])
        return entry

    def update(self, config: ProjectConfig) -> None:
        """Enter what steps and runs have left since the last time; where that is nothing, nothing is written."""
        known = self.entries()
        ids = {entry.id for entry in known}
        goal = goal_entry(config)
        stated = next((entry.text for entry in reversed(known) if (entry.kind, entry.by) == ("goal", "giong")), None)
        new = [] if goal.text == stated else [goal]
        self._write([*new, *(entry for entry in found_entries(self.project, config) if entry.id not in ids)], known)

    def record_failure(self, step: str, error: BaseException, config: ProjectConfig, started: float | None = None) -> None:
        """Enter a step that ended in an error, with the settings of the run that it had begun; once, however often it fails alike."""
        entry = failed_entry(self.project, step, error, config, time.time() if started is None else started)
        known = self.entries()
        last = next((before for before in reversed(known) if before.step == step), None)
        if last is None or (last.text, last.settings) != (entry.text, entry.settings):
            self._write([entry], known)

    def _write(self, new: Sequence[Entry], known: Sequence[Entry] | None = None) -> None:
        known = self.entries() if known is None else known
        for entry in new:
            append_jsonl(self.data_path, asdict(entry))
        before, after = (as_blocks(summary(entries)) for entries in (known, [*known, *new]))
        self._render(before, after)

    def _render(self, before: Mapping[str, str], after: Mapping[str, str]) -> None:
        while True:
            text = self.markdown() if self.path.is_file() else ""
            made = merged(text, after, before, title=f"Journal of {self.project.root.name}")
            if made == text:
                return
            # An editor may have saved in between; what it wrote is then merged and not overwritten.
            if (self.markdown() if self.path.is_file() else "") == text:
                with atomic_write(self.path, "w") as stream:
                    stream.write(made)
                return
