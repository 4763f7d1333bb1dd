"""Whether a reply says what it was asked to say: chrF++ against the author's answer, and the items of the request.

Key recall has no ideal of 1: a faithful human re-styling keeps about two fifths of the content words of its input. The
target is the author's own value on the same requests, so the two are always shown side by side.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from giong.data.words import UNSPACED_CLASS, is_unspaced
from giong.evaluation.metrics.text import word_spans, words

Item = tuple[str, str]
"""(kind, value); kinds are url, date, number, quote, name, word and (for unspaced scripts) pair."""

_URL = re.compile(r"(?:https?://|www\.)[^\s<>\"')\]]*[^\s<>\"')\].,;:!?]")
_DATE = re.compile(r"\b(\d{4})[-/](\d{1,2})[-/](\d{1,2})\b|\b(\d{1,2})[./](\d{1,2})[./](\d{4})\b")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_QUOTE = re.compile(r"“([^“”\n]{2,80})”|\"([^\"\n]{2,80})\"|«\s?([^«»\n]{2,80}?)\s?»|「([^「」\n]{2,80})」")
_UNSPACED_RUN = re.compile(rf"[{UNSPACED_CLASS}]{{2,}}")
_SENTENCE_END = re.compile(r"(?:^|[.!?…:;。！？\n\"“”«»(\-–—*#>])[\s\"“”«»(*#>\-–—]*$")
_VIETNAMESE = re.compile(r"[\u1ea0-\u1ef9đĐơƠưƯ]")
MIN_LETTERS = 4


def chrf_scores(hypotheses: Sequence[str], references: Sequence[str]) -> list[float]:
    """Sentence-level chrF++ (character 6-grams and word 2-grams, Popović 2017) of every pair, 0 to 100."""
    metric = _chrf()
    return [metric.sentence_score(hypothesis, [reference]).score for hypothesis, reference in zip(hypotheses, references, strict=True)]


def chrf_corpus(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Corpus-level chrF++: counts are summed over all pairs first."""
    return _chrf().corpus_score(list(hypotheses), [list(references)]).score


def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF(word_order=2)


def closed_words(texts: Iterable[str], min_share: float = 0.2) -> frozenset[str]:
    """Words (and character pairs of unspaced scripts) that stand in at least `min_share` of the texts, and in three.

    Function words of any language are among them, and so is the wording of an instruction that all requests share.
    """
    texts = list(texts)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(set(words(text)) | _pairs(text))
    needed = max(3.0, min_share * len(texts))
    return frozenset(word for word, count in counts.items() if count >= needed)


def key_items(text: str, closed: frozenset[str] = frozenset()) -> set[Item]:
    """What of a request must be kept: numbers, dates, names, URLs, quoted strings and content words.

    A content word has four letters or more (two in Vietnamese, whose words are syllables) and is not in `closed`. A name
    is capitalised within a sentence. Unspaced scripts give pairs of neighbouring characters.
    """
    items: set[Item] = {("url", url) for url in _URL.findall(text)}
    rest = _URL.sub(" ", text)
    for match in _DATE.finditer(rest):
        year, month, day, day_first, month_second, year_last = match.groups()
        parts = (year, month, day) if year else (year_last, month_second, day_first)
        items.add(("date", "-".join(str(int(part)) for part in parts)))
    rest = _DATE.sub(" ", rest)
    items |= {("number", _plain_number(number)) for number in _NUMBER.findall(rest)}
    items |= {("quote", _squeeze("".join(groups))) for groups in _QUOTE.findall(rest)}
    items |= {("pair", pair) for pair in _pairs(rest) - closed}
    return items | _word_items(rest, closed)


def key_recall(request: str, reply: str, closed: frozenset[str] = frozenset()) -> float:
    """Share of the request's key items that the reply holds; NaN where the request has none."""
    items = key_items(request, closed)
    return sum(_present(items, reply)) / len(items) if items else math.nan


def key_add(request: str, reply: str, closed: frozenset[str] = frozenset()) -> float:
    """Share of the reply's key items that the request does not hold (a proxy for invention); NaN where it has none."""
    items = key_items(reply, closed)
    return 1 - sum(_present(items, request)) / len(items) if items else math.nan


FACTS = ("url", "date", "number", "name")
"""Kinds of items that nobody can guess: they stand in the request, or they have to be looked up."""


def count_facts(request: str, answer: str, reply: str, closed: frozenset[str] = frozenset()) -> tuple[int, int, int]:
    """(facts of the answer, those of them that the request does not hold, those of the latter that the reply gives)."""
    facts = {item for item in key_items(answer, closed) if item[0] in FACTS}
    missing = {item for item, held in zip(facts, _present(facts, request)) if not held}
    return len(facts), len(missing), sum(_present(missing, reply))


def _word_items(text: str, closed: frozenset[str]) -> set[Item]:
    min_letters = 2 if _is_vietnamese(text) else MIN_LETTERS
    items: set[Item] = set()
    for start, end in word_spans(text):
        word = text[start:end]
        plain = _bare(word.casefold())
        if not word[0].isalpha() or is_unspaced(word[0]):
            continue
        if word[0].isupper() and len(plain) > 1 and plain not in closed and not _SENTENCE_END.search(text[max(0, start - 8) : start]):
            items.add(("name", plain))
        elif len(plain) >= min_letters and plain not in closed:
            items.add(("word", plain))
    names = {value for kind, value in items if kind == "name"}
    return {item for item in items if item[0] == "name" or item[1] not in names}


def _present(items: set[Item], text: str) -> list[bool]:
    tokens = [_bare(token) for token in words(text)]
    known, numbers = set(tokens), {_plain_number(number) for number in _NUMBER.findall(text)}
    squeezed, pairs = _squeeze(text), _pairs(text)
    exact_words = _is_vietnamese(text)

    def holds(kind: str, value: str) -> bool:
        match kind:
            case "url":
                return value in text
            case "quote":
                return value in squeezed
            case "number":
                return value in numbers
            case "date":
                # "5 March 2024" keeps 2024-03-05: the month may be spelt out.
                year, _, day = value.split("-")
                return {year, day} <= {number.lstrip("0") for number in re.findall(r"\d+", text)}
            case "pair":
                return value in pairs
            case "name":
                return value in known
        return value in known or (not exact_words and any(_same_stem(value, token) for token in known))

    return [holds(kind, value) for kind, value in items]


def _same_stem(word: str, other: str) -> bool:
    """Whether `other` begins with about two thirds of `word` (at least four letters) and is not much longer."""
    stem = word[: max(MIN_LETTERS, math.ceil(0.65 * len(word)))]
    return other.startswith(stem) and len(other) <= len(word) + 4


def _bare(word: str) -> str:
    for ending in ("'s", "’s"):
        word = word.removesuffix(ending)
    return word


def _plain_number(number: str) -> str:
    """1,000 and 1000 are one number; so are 3 and 3.0 not, because a version is no quantity."""
    return re.sub(r",(?=\d{3}(?:\D|$))", "", number)


def _squeeze(text: str) -> str:
    return " ".join(text.casefold().split())


def _pairs(text: str) -> set[str]:
    return {run[start : start + 2] for run in _UNSPACED_RUN.findall(text) for start in range(len(run) - 1)}


def _is_vietnamese(text: str) -> bool:
    letters = sum(1 for character in text if character.isalpha())
    return letters > 0 and len(_VIETNAMESE.findall(text)) >= 0.05 * letters
