"""Reads .html: trafilatura finds the main text, title and date; quotations, code, tables and headings are taken out first.

The date is read from the page's own metadata only: a guess from a copyright line would spoil a split by date.
"""

from __future__ import annotations

import re
from pathlib import Path

from giong.config.data import DataConfig
from giong.data.importers.found import Found, Unusable, date_in_name, decode, normalise_date

_DECLARED_CHARSET = re.compile(rb"""<meta[^>]+charset=["']?([A-Za-z0-9_-]+)""", re.IGNORECASE)
_CODE_CLASSES = ("highlight", "codehilite", "sourceCode", "code-block")
_PRUNED = [
    "//blockquote", "//pre", "//table", "//figure", "//h1", "//h2", "//h3", "//h4", "//h5", "//h6",
    *(f'//div[contains(concat(" ", normalize-space(@class), " "), " {name} ")]' for name in _CODE_CLASSES),
]  # fmt: skip


def read_html(path: Path, data: bytes, config: DataConfig) -> list[Found | Unusable]:
    """An .html file as one piece of writing."""
    import trafilatura

    decoded = decode(data)
    if isinstance(decoded, Unusable):
        decoded = _decode_as_declared(data) or decoded
    if isinstance(decoded, Unusable):
        return [decoded]
    text, note = decoded
    extracted = trafilatura.bare_extraction(
        text, include_comments=False, include_tables=False, with_metadata=True, prune_xpath=_PRUNED, favor_recall=True,
        date_extraction_params={"extensive_search": False, "original_date": True},
    )  # fmt: skip
    if extracted is None or not extracted.text:
        return [Unusable("no main text was found on the page")]
    date, date_note = normalise_date(extracted.date)
    paragraphs = (line.strip().removeprefix("- ") for line in extracted.text.split("\n"))
    return [
        Found(
            "\n\n".join(line for line in paragraphs if line), extracted.title or path.stem, date or date_in_name(path.name),
            note="; ".join(part for part in (note, date_note) if part),
        )
    ]  # fmt: skip


def _decode_as_declared(data: bytes) -> tuple[str, str] | None:
    """The text in the encoding that the page itself names, where that fits without an error."""
    declared = _DECLARED_CHARSET.search(data[:4096])
    if not declared or b"\x00" in data:
        return None
    encoding = declared.group(1).decode("ascii")
    try:
        return data.decode(encoding), f"read as {encoding}, as the page declares"
    except (UnicodeDecodeError, LookupError):
        return None
