"""Counting words and runs of words: lengths, repetition, and what of a text was copied from a corpus.

Every character of a script without spaces is a token of its own, so that one tokeniser serves mixed text, and two such
characters count as one word wherever a threshold is stated in words.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from giong.data.words import count_words, is_unspaced, tokenize

CHARACTERS_PER_WORD = 2
"""How many characters of an unspaced script count as one word."""


def words(text: str) -> list[str]:
    """The words of a text, case-folded, without punctuation; single characters for unspaced scripts."""
    return [token.text for token in tokenize(text)]


def word_spans(text: str) -> list[tuple[int, int]]:
    """Start and end (characters) of every word, in order."""
    return [(token.start, token.end) for token in tokenize(text)]


def mostly_unspaced(texts: Iterable[str] | str) -> bool:
    """Whether at least half of the tokens are characters of a script without spaces."""
    tokens = [token for text in ([texts] if isinstance(texts, str) else texts) for token in words(text)]
    return bool(tokens) and 2 * sum(1 for token in tokens if is_unspaced(token[0])) >= len(tokens)


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of `n` tokens, in order."""
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def distinct_n(tokens: Sequence[str], n: int) -> float:
    """Share of different n-grams: |set(G_n)| / |G_n|; 1 where there is none."""
    grams = ngrams(tokens, n)
    return len(set(grams)) / len(grams) if grams else 1.0


def rep_n(tokens: Sequence[str], n: int) -> float:
    """Share of repeated n-grams: 1 - distinct-n (Welleck et al. 2019, 1908.04319, section 3)."""
    return 1.0 - distinct_n(tokens, n)


def zlib_ratio(text: str) -> float:
    """UTF-8 bytes before over after compression (level 9). It grows with length: compare at equal length only."""
    data = text.encode()
    return len(data) / len(zlib.compress(data, 9)) if data else 0.0


def length_ratio(text: str, reference: str) -> float:
    """Words of `text` over words of `reference` (an empty text counts as half a word, so that logarithms exist)."""
    return max(count_words(text), 0.5) / max(count_words(reference), 0.5)


def cut_windows(text: str, num_tokens: int) -> list[str]:
    """Consecutive pieces of `num_tokens` tokens; a rest shorter than half of that joins the last piece."""
    spans = word_spans(text)
    starts = list(range(0, max(len(spans), 1), num_tokens))
    if len(starts) > 1 and len(spans) - starts[-1] < num_tokens / 2:
        starts.pop()
    cuts = [spans[start][0] if start else 0 for start in starts] + [len(text)]
    return [piece for begin, end in itertools.pairwise(cuts) if (piece := text[begin:end].strip())]


def overlap_length(texts: Iterable[str] | str) -> int:
    """Tokens of the run that counts as copied: 8 words."""
    return 8 * CHARACTERS_PER_WORD if mostly_unspaced(texts) else 8


_MASK = (1 << 64) - 1
_BASE = 0x9E3779B97F4A7C15 | 1
_BASE_INVERSE = pow(_BASE, -1, 1 << 64)


@functools.lru_cache(maxsize=4)
def _powers(num: int, base: int) -> np.ndarray:
    powers = np.full(num, base, dtype=np.uint64)
    powers[:1] = 1
    return np.cumprod(powers, dtype=np.uint64)


class CorpusIndex:
    """Which runs of words occur in a corpus, found by 64-bit window hashes.

    Each token gets a random 64-bit value; a window's hash is the polynomial of its values modulo 2^64, so all windows of
    one length come from one cumulative sum (Karp & Rabin 1987). Runs never cross from one text into the next.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        texts = list(texts)
        self.overlap_tokens = overlap_length(texts)
        self.unspaced = mostly_unspaced(texts)
        self._random = np.random.default_rng(0)
        self._value_of: dict[str, int] = {}
        values: list[int] = []
        for text in texts:
            values += self._values(words(text))
            values.append(self._new_value())
        self._corpus = np.array(values, dtype=np.uint64)
        self._hashes_of: dict[int, np.ndarray] = {}

    def share_copied(self, text: str, request: str = "", n: int | None = None) -> float:
        """Share of the n-grams of `text` (8 words each by default) that occur in the corpus but not in `request`."""
        n = n or self.overlap_tokens
        windows = self._windows(np.array(self._values(words(text)), dtype=np.uint64), n)
        if not len(windows):
            return 0.0
        copied = self._found(windows, n)
        if request:
            copied &= ~np.isin(windows, self._windows(np.array(self._values(words(request)), dtype=np.uint64), n))
        return float(copied.mean())

    def longest_run(self, text: str) -> int:
        """Tokens of the longest run that `text` shares with one text of the corpus, by bisection over its length."""
        values = np.array(self._values(words(text)), dtype=np.uint64)
        low, high = 0, len(values)
        while low < high:
            middle = (low + high + 1) // 2
            if self._found(self._windows(values, middle), middle).any():
                low = middle
            else:
                high = middle - 1
        return low

    def _found(self, windows: np.ndarray, n: int) -> np.ndarray:
        if n not in self._hashes_of:
            self._hashes_of[n] = np.unique(self._windows(self._corpus, n))
        known = self._hashes_of[n]
        if not len(known):
            return np.zeros(len(windows), dtype=bool)
        return known[np.minimum(np.searchsorted(known, windows), len(known) - 1)] == windows

    def _windows(self, values: np.ndarray, n: int) -> np.ndarray:
        if len(values) < n:
            return np.empty(0, dtype=np.uint64)
        sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(values * _powers(len(values), _BASE), dtype=np.uint64)])
        return (sums[n:] - sums[:-n]) * _powers(len(values), _BASE_INVERSE)[: len(values) - n + 1]

    def _values(self, tokens: Sequence[str]) -> list[int]:
        known = self._value_of
        for token in tokens:
            if token not in known:
                known[token] = self._new_value()
        return [known[token] for token in tokens]

    def _new_value(self) -> int:
        return int(self._random.integers(1, _MASK, dtype=np.uint64)) | 1
