"""Reads .jsonl and .csv: one document per row, fields named in the settings.

Whether the texts are Markdown is decided once per file (a tenth of the rows has headings, fences or links), so that one
author's rows are never read half in one way and half in the other.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from giong.config.data import DataConfig
from giong.data.importers.found import Found, Unusable, decode, normalise_date
from giong.data.importers.text import looks_like_markdown, markdown_prose, plain_prose
from giong.errors import DataError

MIN_MARKDOWN_SHARE = 0.1


Rows = list[tuple[int, Mapping[str, Any]]]
"""(line, fields) of each row of a table."""


def read_jsonl(path: Path, data: bytes, config: DataConfig) -> list[Found | Unusable]:
    """Every line of a .jsonl file. Raises DataError where no row has the text field."""
    decoded = decode(data)
    if isinstance(decoded, Unusable):
        return [decoded]
    rows, bad = jsonl_rows(decoded[0])
    return _in_order(_read_rows(path, rows, config, decoded[1]), bad)


def read_csv(path: Path, data: bytes, config: DataConfig) -> list[Found | Unusable]:
    """Every row of a .csv file with a header line. Raises DataError where no column is the text field."""
    decoded = decode(data)
    if isinstance(decoded, Unusable):
        return [decoded]
    rows, bad, columns = csv_rows(decoded[0])
    if columns and config.text_field not in columns:
        raise _no_text_field(path, 1, columns, config)
    return _in_order(_read_rows(path, rows, config, decoded[1]), bad)


def jsonl_rows(text: str) -> tuple[Rows, list[Unusable]]:
    """The rows of a .jsonl file, and its lines that are none."""
    rows: Rows = []
    bad: list[Unusable] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            bad.append(Unusable(f"not valid JSON: {error.msg} (column {error.colno})", number))
            continue
        if isinstance(value, dict):
            rows.append((number, value))
        else:
            bad.append(Unusable("not a JSON object with named fields", number))
    return rows, bad


def csv_rows(text: str) -> tuple[Rows, list[Unusable], list[str]]:
    """The rows of a .csv file, its lines that are none, and its columns."""
    csv.field_size_limit(2**31 - 1)
    first_line = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=first_line.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: Rows = []
    bad: list[Unusable] = []
    line = 2
    try:
        for row in reader:
            if None in row or None in row.values():
                bad.append(Unusable(f"the number of fields differs from the header ({len(reader.fieldnames or ())})", line))
            else:
                rows.append((line, row))
            line = reader.line_num + 1
    except csv.Error as error:
        bad.append(Unusable(f"not valid CSV: {error}; the rest of the file is left out", line))
    return rows, bad, list(reader.fieldnames or ())


def _read_rows(path: Path, rows: Rows, config: DataConfig, note: str) -> list[Found | Unusable]:
    if rows and not any(config.text_field in row for _, row in rows):
        raise _no_text_field(path, rows[0][0], list(rows[0][1]), config)
    texts = [text for _, row in rows if isinstance(text := row.get(config.text_field), str)]
    is_markdown = sum(map(looks_like_markdown, texts)) > MIN_MARKDOWN_SHARE * len(texts)
    found: list[Found | Unusable] = []
    for line, row in rows:
        text = row.get(config.text_field)
        if config.text_field not in row:
            found.append(Unusable(f"no field {config.text_field!r}; it has: {', '.join(row) or 'none'}", line))
        elif not isinstance(text, str):
            found.append(Unusable(f"field {config.text_field!r} holds no text but {type(text).__name__}", line))
        elif not text.strip():
            found.append(Unusable(f"field {config.text_field!r} is empty", line))
        else:
            date, date_note = normalise_date(row.get(config.date_field))
            prose = markdown_prose(text)[0] if is_markdown else plain_prose(text)
            notes = (note, "read as Markdown" if is_markdown else "", date_note)
            found.append(
                Found(
                    prose, str(row.get(config.title_field) or ""), date, str(row.get(config.id_field) or ""), line,
                    "; ".join(part for part in notes if part),
                )
            )  # fmt: skip
    return found


def _in_order(found: list[Found | Unusable], bad: list[Unusable]) -> list[Found | Unusable]:
    everything = sorted([*found, *bad], key=lambda item: item.line)
    return everything or [Unusable("no rows")]


def _no_text_field(path: Path, line: int, fields: list[str], config: DataConfig) -> DataError:
    return DataError(
        f"No field {config.text_field!r} in {path.name}; it has: {', '.join(fields) or 'none'}",
        place=f"{path}:{line}", remedy="Name the field that holds the text with data.text_field.",
    )  # fmt: skip
