"""What a reader hands back: pieces of writing, and pieces that could not be read. Also how bytes become text.

Bytes are UTF-8 unless a byte-order mark says otherwise. Windows-1252 is accepted only where it cannot be broken UTF-8 or
another legacy encoding: a wrong guess would teach a model mojibake, so in doubt the file is left out and named.
"""

from __future__ import annotations

import codecs
import datetime
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from giong.config.data import DataConfig

# German, French or Portuguese prose has 1 to 6 % letters outside ASCII; Asian and Cyrillic encodings far more.
MAX_CP1252_SHARE = 0.08
MAX_UNDECODABLE_SHARE = 0.10
_VALID_SEQUENCE = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
_CP1252_LETTERS = frozenset(
    b"\x80\x85\x8a\x8c\x8e\x91\x92\x93\x94\x95\x96\x97\x99\x9a\x9c\x9e\x9f\xa0\xa1\xa3\xa7\xa9\xab\xb0\xb4\xb7\xbb\xbf"
) | (frozenset(range(0xC0, 0x100)) - {0xD7, 0xF7})
_DATE = re.compile(r"(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})")


@dataclass(frozen=True, slots=True)
class Found:
    """One piece of writing before cleaning; `line` is its row in a table (0 for a whole file), `id` only where it is named."""

    text: str
    title: str = ""
    date: str = ""
    id: str = ""
    line: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True)
class Unusable:
    """A file or row that cannot be used, and why."""

    reason: str
    line: int = 0


Reader = Callable[[Path, bytes, DataConfig], list[Found | Unusable]]


def decode(data: bytes) -> tuple[str, str] | Unusable:
    """The text of a file and a note on its encoding (empty for UTF-8), or why it has none."""
    if not data:
        return Unusable("the file is empty (0 bytes)")
    for mark, encoding in ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")):
        if data.startswith(mark):
            try:
                return data.decode(encoding), "" if encoding == "utf-8-sig" else "read as UTF-16"
            except UnicodeDecodeError as error:
                return Unusable(f"not valid {encoding.removesuffix('-sig').upper()} at byte {error.start}; save it as UTF-8")
    if b"\x00" in data:
        return Unusable(f"binary, not text (a NUL byte at byte {data.index(0)})")
    try:
        return data.decode("utf-8"), ""
    except UnicodeDecodeError as error:
        return _decode_legacy(data, error.start)


def _decode_legacy(data: bytes, offset: int) -> tuple[str, str] | Unusable:
    high = [byte for byte in data if byte >= 0x80]
    control = sum(1 for byte in data if byte < 0x20 and byte not in b"\t\n\r\x0c")
    undecodable = data.decode("utf-8", "replace").count("\ufffd")
    is_cp1252 = not _VALID_SEQUENCE.search(data) and not control and len(high) <= MAX_CP1252_SHARE * len(data)
    if is_cp1252 and all(byte in _CP1252_LETTERS for byte in high):
        return data.decode("cp1252"), "read as Windows-1252"
    if control + undecodable > MAX_UNDECODABLE_SHARE * len(data) and control:
        return Unusable(f"binary, not text (undecodable from byte {offset})")
    return Unusable(f"not valid UTF-8 at byte {offset} (0x{data[offset]:02x}); save it as UTF-8")


def normalise_date(value: Any) -> tuple[str, str]:
    """An ISO 8601 date (YYYY-MM-DD) from a date, or from a text that begins with one, and a note where it is not understood."""
    if value is None or value == "":
        return "", ""
    if isinstance(value, datetime.date):
        return value.isoformat()[:10], ""
    match = _DATE.match(str(value).strip())
    try:
        if match:
            return datetime.date(*(int(part) for part in match.groups())).isoformat(), ""
    except ValueError:
        pass
    return "", f"date {str(value)[:40]!r} not understood, write YYYY-MM-DD"


def date_in_name(name: str) -> str:
    """The date YYYY-MM-DD that a file name holds, or an empty text."""
    for match in re.finditer(r"(?<!\d)\d{4}-\d{2}-\d{2}(?!\d)", name):
        date, _ = normalise_date(match.group())
        if date:
            return date
    return ""
