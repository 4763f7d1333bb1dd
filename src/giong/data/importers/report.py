"""What an import found: one entry for every file and row, kept or not, with the reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["kept", "dropped", "skipped"]


@dataclass(frozen=True, slots=True)
class ImportEntry:
    """One file or row. `dropped` held writing that could not be used; `skipped` is not of a known kind.

    `place` is the file, with the line where it is a row; `reason` may also note something about what was kept.
    """

    place: str
    status: Status
    reason: str = ""
    num_words: int = 0
    document_id: str = ""


@dataclass(slots=True)
class ImportReport:
    """All entries of an import, in reading order."""

    entries: list[ImportEntry] = field(default_factory=list)

    def with_status(self, status: Status) -> list[ImportEntry]:
        return [entry for entry in self.entries if entry.status == status]

    @property
    def num_words(self) -> int:
        """Words of what was kept."""
        return sum(entry.num_words for entry in self.with_status("kept"))

    def to_dict(self) -> dict[str, Any]:
        counts = Counter(entry.status for entry in self.entries)
        return {
            "num_kept": counts["kept"], "num_dropped": counts["dropped"], "num_skipped": counts["skipped"],
            "num_words": self.num_words, "entries": [asdict(entry) for entry in self.entries],
        }  # fmt: skip
