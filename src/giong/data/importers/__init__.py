"""From files and folders to documents: what only the author wrote, cleaned, with a report of everything found.

READERS is the whole list of kinds. A file that cannot be read never stops an import; it is listed with its reason, and
only an import that brings nothing at all is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from giong.config.data import DataConfig
from giong.contracts import Document, OnProgress
from giong.data.cleaning import clean_text
from giong.data.importers.found import Found, Reader, Unusable
from giong.data.importers.html import read_html
from giong.data.importers.report import ImportEntry, ImportReport
from giong.data.importers.tabular import read_csv, read_jsonl
from giong.data.importers.text import read_markdown, read_text
from giong.data.words import count_words
from giong.errors import DataError
from giong.workspace import CONFIG_NAME

__all__ = ["READERS", "ImportEntry", "ImportReport", "import_documents", "source_files"]

READERS: dict[str, Reader] = {
    ".md": read_markdown,
    ".markdown": read_markdown,
    ".txt": read_text,
    ".html": read_html,
    ".htm": read_html,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
}
# What giong itself writes into a project folder; a project may lie inside the folder that it imports.
_PROJECT_FOLDERS = frozenset({"data", "steps", "arms", "runs", "models", "exports"})
_PROJECT_FILES = frozenset({CONFIG_NAME, "report.html"})


def import_documents(
    paths: Sequence[Path], config: DataConfig, on_progress: OnProgress | None = None
) -> tuple[list[Document], ImportReport]:
    """Read files and folders into cleaned documents, in sorted order. `on_progress` counts files.

    Raises DataError where a path does not exist, a table has no text field, or nothing usable was found.
    """
    documents: dict[str, Document] = {}
    first_places: dict[str, str] = {}
    report = ImportReport()
    files = source_files(paths, report)
    for done, (root, file) in enumerate(files, start=1):
        name = file.relative_to(root).as_posix() if root.is_dir() else file.name
        reader = READERS.get(file.suffix.lower())
        if reader is None:
            report.entries.append(ImportEntry(str(file), "skipped", f"unknown kind {file.suffix or '(no suffix)'!r}"))
        else:
            for item in _read(reader, file, config):
                _add(item, file, name, documents, first_places, report)
        if on_progress:
            on_progress(done, len(files))
    if not documents:
        raise _nothing_usable(paths, report)
    return list(documents.values()), report


def source_files(paths: Sequence[Path], report: ImportReport | None = None) -> list[tuple[Path, Path]]:
    """What an import reads, in its order: (path named, file in it). Raises DataError where a path does not exist."""
    report = report or ImportReport()
    return [(root, file) for root in map(Path, paths) for file in _files(root, report)]


def _read(reader: Reader, file: Path, config: DataConfig) -> list[Found | Unusable]:
    try:
        data = file.read_bytes()
    except OSError as error:
        return [Unusable(f"cannot be read: {error.strerror}")]
    return reader(file, data, config)


def _add(
    item: Found | Unusable, file: Path, name: str, documents: dict[str, Document], first_places: dict[str, str], report: ImportReport
) -> None:
    place = f"{file}:{item.line}" if item.line else str(file)
    if isinstance(item, Unusable):
        report.entries.append(ImportEntry(place, "dropped", item.reason))
        return
    document_id = item.id or (f"{name}:{item.line}" if item.line else name)
    text = clean_text(item.text)
    num_words = count_words(text)
    reason = ""
    if document_id in documents:
        if not item.id and first_places[document_id] != place:
            document_id = place
        else:
            reason = f"the id {document_id!r} was already used at {first_places[document_id]}"
    if not num_words:
        reason = "no prose is left without front matter, headings, code and quotations"
    if reason:
        report.entries.append(ImportEntry(place, "dropped", reason, num_words, document_id))
        return
    documents[document_id] = Document(document_id, text, clean_text(item.title), item.date, place)
    first_places[document_id] = place
    report.entries.append(ImportEntry(place, "kept", item.note, num_words, document_id))


def _files(root: Path, report: ImportReport) -> Iterator[Path]:
    """The files of a folder and its sub-folders in sorted order; hidden ones and giong's own are passed over."""
    if not root.exists():
        raise DataError(f"There is no file or folder {root.name!r}", place=str(root), remedy="Correct data.paths in giong.yaml.")
    if root.is_file():
        yield root
        return
    for folder, folders, files in os.walk(root, onerror=lambda error: _note_unreadable(error, report)):
        own = CONFIG_NAME in files
        if own:
            report.entries.append(ImportEntry(folder, "skipped", "giong's own files in this project folder"))
        folders[:] = sorted(f for f in folders if not f.startswith(".") and not (own and f in _PROJECT_FOLDERS))
        yield from (Path(folder) / f for f in sorted(files) if not f.startswith(".") and not (own and f in _PROJECT_FILES))


def _note_unreadable(error: OSError, report: ImportReport) -> None:
    report.entries.append(ImportEntry(str(error.filename), "dropped", f"cannot be read: {error.strerror}"))


def _nothing_usable(paths: Sequence[Path], report: ImportReport) -> DataError:
    known = ", ".join(READERS)
    place = ", ".join(str(path) for path in paths)
    remedy = f"Put files of these kinds there, or correct data.paths: {known}."
    if not paths:
        return DataError("data.paths names no file or folder", place="data.paths", remedy="List the author's files or folders there.")
    if not report.entries:
        return DataError("Nothing was found to import: the folder is empty", place=place, remedy=remedy)
    first = (report.with_status("dropped") or report.entries)[0]
    more = f" (and {len(report.entries) - 1} more)" if len(report.entries) > 1 else ""
    return DataError(f"Nothing usable was found to import: {first.place}: {first.reason}{more}", place=place, remedy=remedy)
