"""Texts with labels: .jsonl and .csv files with a text column and a label column, for `task: classify`.

One decision a reader may question: a row that holds nothing usable is left out and named, but a label that should not be there
(unknown, out of range) stops the import: it is a mistake in the data that no model can be blamed for later.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from giong.config import ClassifyConfig, DataConfig
from giong.contracts import Passage
from giong.data.importers import source_files
from giong.data.importers.found import Unusable, decode
from giong.data.importers.report import ImportEntry, ImportReport
from giong.data.importers.tabular import csv_rows, jsonl_rows
from giong.errors import DataError

Label = list[str] | float
"""A row's labels (one of them with `single_label`), or the value of a regression."""


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row of a table: where it stands (file:line), and its fields."""

    place: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Labelled:
    """Texts as passages, the label of each by its id, and what kind of labels they are."""

    passages: list[Passage]
    labels: dict[str, Label]
    names: list[str]
    problem: str


def read_tables(paths: Sequence[Path], required: Sequence[str], report: ImportReport) -> list[TableRow]:
    """Rows whose `required` fields are there and not empty; all others are listed in the report with their reason.

    Raises DataError where no row is left, and for a file none of whose rows has a required field.
    """
    found: list[TableRow] = []
    for _, file in source_files(paths, report):
        read = {".jsonl": jsonl_rows, ".csv": csv_rows}.get(file.suffix.lower())
        if read is None:
            report.entries.append(ImportEntry(str(file), "skipped", "neither .jsonl nor .csv"))
            continue
        decoded = decode(file.read_bytes())
        if isinstance(decoded, Unusable):
            report.entries.append(ImportEntry(str(file), "dropped", decoded.reason))
            continue
        rows, bad, *_ = read(decoded[0])
        report.entries.extend(ImportEntry(f"{file}:{item.line}", "dropped", item.reason) for item in bad)
        for field in required:
            if rows and not any(field in row for _, row in rows):
                raise DataError(
                    f"No field {field!r} in {file.name}; it has: {', '.join(rows[0][1]) or 'none'}", place=f"{file}:{rows[0][0]}",
                    remedy="Name the columns in giong.yaml, in the section of your task.",
                )  # fmt: skip
        for line, row in rows:
            empty = next((field for field in required if row.get(field) in (None, "", []) or not str(row[field]).strip()), None)
            if empty:
                report.entries.append(ImportEntry(f"{file}:{line}", "dropped", f"field {empty!r} is empty"))
            else:
                found.append(TableRow(f"{file}:{line}", row))
    if not found:
        first = next(iter(report.with_status("dropped")), None)
        what = f": {first.place}: {first.reason}" if first else ""
        raise DataError(f"No usable row was found{what}", place=", ".join(map(str, paths)), remedy="Mend the files, or correct data.paths.")
    return found


def row_id(row: TableRow, data: DataConfig) -> str:
    """The id that the row gives itself, else its file and line."""
    return str(row.fields.get(data.id_field) or Path(row.place).name)


def read_labelled(paths: Sequence[Path], data: DataConfig, config: ClassifyConfig) -> tuple[Labelled, ImportReport]:
    """The labelled texts of the files. Raises DataError for unknown labels, values out of range, and a single class."""
    report = ImportReport()
    rows = read_tables(paths, (data.text_field, config.label_field), report)
    problem = _problem(rows, config) if config.problem == "auto" else config.problem
    passages: dict[str, Passage] = {}
    labels: dict[str, Label] = {}
    for row in rows:
        label = _label(row, problem, config)
        if label is None:
            reason = f"the label {row.fields[config.label_field]!r} is no number"
            report.entries.append(ImportEntry(row.place, "dropped", reason))
            continue
        id = row_id(row, data)
        if id in passages:
            report.entries.append(ImportEntry(row.place, "dropped", f"the id {id!r} was already used"))
            continue
        document = row.fields.get(config.document_field) if config.document_field else None
        text = str(row.fields[data.text_field]).strip()
        passages[id] = Passage(id, str(document or id), 0, text)
        labels[id] = label
        report.entries.append(ImportEntry(row.place, "kept", "", len(text.split()), passages[id].document_id))
    return Labelled(list(passages.values()), labels, _names(labels, problem, config, paths), problem), report


def _problem(rows: Sequence[TableRow], config: ClassifyConfig) -> str:
    values = [row.fields[config.label_field] for row in rows]
    if any(isinstance(value, list) for value in values):
        return "multi_label"
    if config.labels:
        return "single_label"
    numbers = [_number(value) for value in values]
    is_regression = all(number is not None for number in numbers) and any(number % 1 for number in numbers if number is not None)
    return "regression" if is_regression else "single_label"


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None


def _label(row: TableRow, problem: str, config: ClassifyConfig) -> Label | None:
    """The label of a row; None for a value that is no number. Raises DataError for what must not be there."""
    value = row.fields[config.label_field]
    if problem == "regression":
        number = _number(value)
        if number is not None and config.value_range and not config.value_range[0] <= number <= config.value_range[1]:
            raise DataError(
                f"The value {number:g} lies outside classify.value_range {list(config.value_range)}", place=row.place,
                remedy="Correct the row, or the range.",
            )  # fmt: skip
        return number
    if problem == "single_label" and isinstance(value, list):
        if len(value) != 1:
            raise DataError(
                f"A row has {len(value)} labels, and classify.problem is single_label", place=row.place, remedy="Use multi_label."
            )
        value = value[0]
    parts = value if isinstance(value, list) else str(value).split(config.label_separator) if problem == "multi_label" else [value]
    names = list(dict.fromkeys(name for part in parts if (name := str(part).strip())))
    for name in names:
        if config.labels and name not in config.labels:
            nearest = difflib.get_close_matches(name, config.labels, n=1)
            hint = f"Did you mean {nearest[0]!r}?" if nearest else f"Known: {', '.join(config.labels)}."
            raise DataError(f"The label {name!r} is not in classify.labels", place=row.place, remedy=hint)
    return names


def _names(labels: Mapping[str, Label], problem: str, config: ClassifyConfig, paths: Sequence[Path]) -> list[str]:
    if problem == "regression":
        values = [label for label in labels.values() if isinstance(label, float)]
        if len(set(values)) < 2:
            raise DataError(
                f"Every row has the value {values[0]:g}: there is nothing to learn" if values else "No row has a value",
                place=", ".join(map(str, paths)), remedy="Add rows with other values.",
            )  # fmt: skip
        return []
    found = sorted({name for label in labels.values() if isinstance(label, list) for name in label})
    if len(found) < 2 and (problem == "single_label" or not found):
        raise DataError(
            f"Every row has the label {found[0]!r}: there is nothing to tell apart" if found else "No row has a label",
            place=", ".join(map(str, paths)), remedy="Add rows with other labels, or correct classify.label_field.",
        )  # fmt: skip
    return config.labels or found
