"""Texts that belong together: .jsonl and .csv files with a text, its positive and optionally a negative, for `task: embed`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from giong.config import DataConfig, EmbedConfig
from giong.contracts import Passage
from giong.data.importers.report import ImportEntry, ImportReport
from giong.data.labelled import read_tables, row_id
from giong.errors import DataError


@dataclass(frozen=True, slots=True)
class Paired:
    """The texts (queries, say) as passages, and by id what belongs to each: its positive, then its negatives."""

    passages: list[Passage]
    others: dict[str, list[str]]


def read_paired(paths: Sequence[Path], data: DataConfig, config: EmbedConfig) -> tuple[Paired, ImportReport]:
    """The pairs and triplets of the files. Raises DataError where nothing is left, and where a loss on triplets finds a row without one."""
    report = ImportReport()
    rows = read_tables(paths, (config.anchor_field, config.positive_field), report)
    passages: dict[str, Passage] = {}
    others: dict[str, list[str]] = {}
    for row in rows:
        id, text = row_id(row, data), str(row.fields[config.anchor_field]).strip()
        positive, negative = (row.fields.get(field) for field in (config.positive_field, config.negative_field))
        positive = str(positive).strip()
        negatives = [str(item).strip() for item in (negative if isinstance(negative, list) else [negative]) if str(item or "").strip()]
        if config.loss == "triplet" and not negatives:
            raise DataError(
                f"A row has no {config.negative_field!r}, and the triplet loss compares with it", place=row.place,
                remedy="Add it, or set embed.loss: in_batch.",
            )  # fmt: skip
        reason = (
            f"the id {id!r} was already used" if id in passages
            else "the positive is the text itself" if positive == text
            else "a negative is the positive" if positive in negatives
            else ""
        )  # fmt: skip
        if reason:
            report.entries.append(ImportEntry(row.place, "dropped", reason))
            continue
        document = row.fields.get(config.document_field) if config.document_field else None
        passages[id] = Passage(id, str(document or id), 0, text)
        others[id] = [positive, *negatives]
        report.entries.append(ImportEntry(row.place, "kept", "", len(text.split()), passages[id].document_id))
    if len(passages) < 3:
        raise DataError(f"{len(passages)} usable pairs are too few", place=", ".join(map(str, paths)), remedy="Add pairs.")
    return Paired(list(passages.values()), others), report
