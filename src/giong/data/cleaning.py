"""Cleaning, de-duplicating and cutting: from a document as it was found to passages that a model is asked to write.

Cleaning repairs what machines did (mojibake, control characters, stray white space) and keeps what the author did: curly
quotes, dashes, full-width punctuation, ligatures and entities stay, although ftfy would by default make them plain. They
are part of the voice.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from giong.contracts import Document, Passage
from giong.data.words import UNSPACED_CLASS, count_words, is_unspaced

__all__ = ["Dropped", "DuplicateReport", "clean_text", "count_words", "cut_passages", "cut_with_report", "deduplicate", "text_hash"]

Span = tuple[int, int]
Item = TypeVar("Item", Document, Passage)

# Zero-width space, word joiner, byte-order mark, soft hyphen: never the author's. (Joiners are looked at one by one.)
_ZERO_WIDTH = re.compile("[\u200b\u2060\ufeff\u00ad]")
# Joiners shape emoji and letters of scripts beyond Latin; anywhere else they are debris of a copy from a page.
_STRAY_JOINER = re.compile("(?<![^\\x00-\u024f])[\u200c\u200d]|[\u200c\u200d](?![^\\x00-\u024f])")
_SPACES = re.compile("[ \t\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]+")
_BLANK_LINES = re.compile(r"\n{3,}")

_PARAGRAPH_BREAK = re.compile(r"\n[ \t]*\n\s*")
_LINE_BREAK = re.compile(r"\n\s*")
_CLOSERS = "\"'”’»)\\]」』）》】"
_SENTENCE_BREAK = re.compile(
    rf"(?:[.!?…]+[{_CLOSERS}]*(?=\s)|[。！？]+[{_CLOSERS}]*|…+(?=[{UNSPACED_CLASS}])|(?<=[\u0e00-\u0e7f]) (?=[\u0e00-\u0e7f]))"
)
_CLAUSE_BREAK = re.compile(r"[,;:—–](?=\s)|[，、；：]")
# A full stop after these ends no sentence; single letters are initials.
_ABBREVIATION_WORDS = "mr mrs ms dr prof st vs etc e.g i.e cf no fig approx inc ltd jr sr tp th.s ts gs pgs tr v.v vd"
_ABBREVIATIONS = frozenset(_ABBREVIATION_WORDS.split())


@dataclass(frozen=True, slots=True)
class Dropped:
    """A text that was left out, where it came from and why."""

    place: str
    reason: str
    num_words: int


@dataclass(slots=True)
class DuplicateReport:
    """How many were given and kept, and each one left out as (its id, the id that it repeats)."""

    num_given: int = 0
    num_kept: int = 0
    duplicates: list[tuple[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def clean_text(text: str) -> str:
    """Repair encoding, normalise to NFC and tidy white space; words and punctuation stay as written. Idempotent."""
    import ftfy

    text = ftfy.fix_text(
        text, unescape_html=False, uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False,
        replace_lossy_sequences=False, normalization="NFC", explain=False,
    )  # fmt: skip
    text = _STRAY_JOINER.sub("", _ZERO_WIDTH.sub("", text))
    lines = (_SPACES.sub(" ", line).strip() for line in text.split("\n"))
    return unicodedata.normalize("NFC", _BLANK_LINES.sub("\n\n", "\n".join(lines)).strip())


def text_hash(text: str) -> str:
    """SHA-256 over the text without case and with single spaces: two texts that read alike hash alike."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode("utf-8", "surrogatepass")).hexdigest()


def deduplicate(items: Sequence[Item]) -> tuple[list[Item], DuplicateReport]:
    """Keep the first of texts that read alike (documents or passages), in order."""
    first_ids: dict[str, str] = {}
    kept: list[Item] = []
    report = DuplicateReport(num_given=len(items))
    for item in items:
        key = text_hash(item.text)
        if key in first_ids:
            report.duplicates.append((item.id, first_ids[key]))
        else:
            first_ids[key] = item.id
            kept.append(item)
    report.num_kept = len(kept)
    return kept, report


def cut_passages(documents: Iterable[Document], min_words: int, max_words: int) -> list[Passage]:
    """Cut documents into passages of `min_words` to `max_words` words, each an exact substring of its document."""
    return cut_with_report(documents, min_words, max_words)[0]


def cut_with_report(
    documents: Iterable[Document], min_words: int, max_words: int, *, merge_paragraphs: bool = True
) -> tuple[list[Passage], list[Dropped]]:
    """The same, with everything that was too short to keep.

    Paragraphs are merged up to `max_words` (or, without `merge_paragraphs`, only where one is too short to stand alone). A
    longer one is cut at line ends, else sentence ends, else clause ends, and in the middle of a clause only where nothing
    else is left. A leftover shorter than `min_words` joins its neighbour, or
    shares its text, where both then keep to the limits.
    """
    passages: list[Passage] = []
    dropped: list[Dropped] = []
    for document in documents:
        text = document.text
        whole = [(0, len(text))] if merge_paragraphs else _paragraphs(text, (0, len(text)))
        spans = [span for part in whole for span in _pack(text, _units(text, part, max_words, _LEVELS), max_words)]
        kept = 0
        for start, end in _mend_short(text, spans, min_words, max_words):
            num_words = count_words(text[start:end])
            if num_words < min_words:
                line = text.count("\n", 0, start) + 1
                reason = f"{num_words} words, fewer than data.min_words ({min_words}), and no neighbour has room"
                dropped.append(Dropped(f"{document.id}:{line}", reason, num_words))
                continue
            passage_id = f"{document.id}#{kept}"
            passages.append(Passage(passage_id, document.id, kept, text[start:end], document.title, document.date))
            kept += 1
    return passages, dropped


def _units(text: str, span: Span, max_words: int, levels: Sequence[Callable[[str, Span], list[Span]]]) -> list[Span]:
    """The largest pieces of `span` that have at most `max_words` words, cut at the coarsest level that does it."""
    span = _strip(text, span)
    if span[0] >= span[1]:
        return []
    if levels and levels[0] is not _paragraphs and count_words(text[slice(*span)]) <= max_words:
        return [span]
    if not levels:
        return _hard_cut(text, span, max_words)
    return [unit for piece in levels[0](text, span) for unit in _units(text, piece, max_words, levels[1:])]


def _split_at(pattern: re.Pattern[str], text: str, span: Span, ends: Callable[[str, re.Match[str]], bool]) -> list[Span]:
    pieces, start = [], span[0]
    for match in pattern.finditer(text, *span):
        if ends(text, match):
            pieces.append((start, match.end()))
            start = match.end()
    return [*pieces, (start, span[1])]


def _paragraphs(text: str, span: Span) -> list[Span]:
    return _split_at(_PARAGRAPH_BREAK, text, span, lambda *_: True)


def _lines(text: str, span: Span) -> list[Span]:
    return _split_at(_LINE_BREAK, text, span, lambda *_: True)


def _sentences(text: str, span: Span) -> list[Span]:
    return _split_at(_SENTENCE_BREAK, text, span, _ends_sentence)


def _clauses(text: str, span: Span) -> list[Span]:
    return _split_at(_CLAUSE_BREAK, text, span, lambda *_: True)


_LEVELS = (_paragraphs, _lines, _sentences, _clauses)


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    if text[match.end() : match.end() + 80].lstrip()[:1].islower():
        return False
    if match.group() != ".":
        return True
    words = text[max(0, match.start() - 20) : match.start()].split()
    last = words[-1].lstrip("(\"'“‘").casefold() if words else ""
    return not (last in _ABBREVIATIONS or (len(last) == 1 and last.isalpha() and last != "i"))


def _hard_cut(text: str, span: Span, max_words: int) -> list[Span]:
    """Cut a clause without any punctuation: between words, or between characters of a script without spaces."""
    pieces, start, num_words = [], span[0], 0.0
    for atom_start, atom_end in _atoms(text, span):
        atom = text[atom_start:atom_end]
        atom_words = 0.5 if is_unspaced(atom[0]) else float(any(map(str.isalnum, atom)))
        if num_words + atom_words > max_words:
            pieces.append(_strip(text, (start, atom_start)))
            start, num_words = atom_start, 0.0
        num_words += atom_words
    return [*pieces, _strip(text, (start, span[1]))]


def _atoms(text: str, span: Span) -> list[Span]:
    """What is never cut: a run of characters without a space, or one character of a script without spaces and its marks."""
    atoms: list[Span] = []
    previous = " "
    for index in range(*span):
        character = text[index]
        is_mark = unicodedata.category(character)[0] == "M"
        starts = previous.isspace() or is_unspaced(character) or is_unspaced(previous)
        if starts and not character.isspace() and (previous.isspace() or not is_mark):
            atoms.append((index, index + 1))
        elif atoms and not character.isspace():
            atoms[-1] = (atoms[-1][0], index + 1)
        previous = character
    return atoms


def _pack(text: str, units: Sequence[Span], max_words: int) -> list[Span]:
    """Merge neighbouring units while they stay within `max_words`."""
    packed: list[Span] = []
    num_words = 0
    for start, end in units:
        unit_words = count_words(text[start:end])
        if packed and num_words + unit_words <= max_words:
            packed[-1] = (packed[-1][0], end)
            num_words += unit_words
        else:
            packed.append((start, end))
            num_words = unit_words
    return packed


def _mend_short(text: str, spans: list[Span], min_words: int, max_words: int) -> list[Span]:
    """Join each too short span with a neighbour, or move the cut between them, where both then keep to the limits."""
    spans = list(spans)
    index = 0
    while index < len(spans):
        if count_words(text[slice(*spans[index])]) < min_words:
            for left in (index - 1, index):
                if not 0 <= left < len(spans) - 1:
                    continue
                mended = _recut(text, (spans[left][0], spans[left + 1][1]), min_words, max_words)
                if mended:
                    spans[left : left + 2] = mended
                    index = left
                    break
        index += 1
    return spans


def _recut(text: str, span: Span, min_words: int, max_words: int) -> list[Span] | None:
    """One span if it is short enough, else two at the cut nearest the middle that leaves both within the limits."""
    if count_words(text[slice(*span)]) <= max_words:
        return [span]
    for level in _LEVELS[:3]:
        cuts = []
        for _, middle in level(text, span)[:-1]:
            left, right = _strip(text, (span[0], middle)), _strip(text, (middle, span[1]))
            num_left, num_right = count_words(text[slice(*left)]), count_words(text[slice(*right)])
            if min_words <= num_left <= max_words and min_words <= num_right <= max_words:
                cuts.append((abs(num_left - num_right), [left, right]))
        if cuts:
            return min(cuts)[1]
    return None


def _strip(text: str, span: Span) -> Span:
    start, end = span
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end
