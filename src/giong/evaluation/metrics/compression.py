"""How well one writer's text predicts another's: prediction by partial matching (PPM), the witness that sees whole sequences.

The models are frozen: a text is scored against what the reference taught, and learns nothing from itself, so that all characters of
all texts are looked up at once (numpy) and a loop cannot make itself likely. Contexts are blended and not excluded: the
probabilities then sum to one by construction, where exclusion needs a pass over every symbol at every step.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

ORDER = 5
"""Characters of context. One more or less changes little; the tables grow with each."""
MAX_REFERENCE_CHARACTERS = 1_000_000
"""Of each reference; longer ones are thinned out evenly, so that the tables stay small."""
CHARACTERS_PER_BATCH = 500_000
_BASE = np.uint64(0x9E3779B97F4A7C15)


class Ppm:
    """An order-5 model of the characters of one reference.

    P_k(s) = (c_k(s) + q_k P_(k-1)(s)) / (t_k + q_k), where context k was followed t_k times, by q_k different characters, c_k(s)
    times by s: escape method C (Moffat 1990, IEEE Trans. Comm. 38, section III) with full blending (Bell, Cleary and Witten 1990,
    Text Compression, section 6.1). Below order 0 lies an even share for each of `num_symbols` characters.
    """

    def __init__(self, texts: Sequence[str], num_symbols: int, order: int = ORDER) -> None:
        self.order, self.num_symbols = order, num_symbols
        self._tables: list[_Table] = []
        values, is_symbol = _laid_out(_thinned(texts), order)
        runs, contexts = values, np.zeros_like(values)
        for _ in range(order + 1):
            self._tables.append(_Table(runs[is_symbol], contexts[is_symbol]))
            runs, contexts = _longer(runs, values), _shifted(runs)

    def bits(self, texts: Sequence[str]) -> np.ndarray:
        """Bits that each text costs, shape (len(texts),); 0 for an empty one."""
        bits = np.zeros(len(texts))
        for start, stop in _batches(texts):
            part = texts[start:stop]
            values, is_symbol = _laid_out(part, self.order)
            owners = np.repeat(np.arange(start, stop), [len(text) for text in part])
            bits += np.bincount(owners, weights=-np.log2(self._probabilities(values, is_symbol)), minlength=len(texts))
        return bits

    def _probabilities(self, values: np.ndarray, is_symbol: np.ndarray) -> np.ndarray:
        """Probability of each character in its context, without the marks between texts."""
        probability = np.full(int(is_symbol.sum()), 1 / self.num_symbols)
        # Behind an unseen context lies no seen longer one: each order looks at fewer characters.
        reached = np.arange(len(probability))
        runs, contexts = values, np.zeros_like(values)
        for table in self._tables:
            totals, kinds = table.followers_of(contexts[is_symbol][reached])
            seen = totals > 0
            reached, totals, kinds = reached[seen], totals[seen], kinds[seen]
            counts = table.counts_of(runs[is_symbol][reached])
            probability[reached] = (counts + kinds * probability[reached]) / (totals + kinds)
            runs, contexts = _longer(runs, values), _shifted(runs)
        return probability


class _Table:
    """How often each run of one length occurs, and how often and by how many characters each run one shorter is followed."""

    def __init__(self, runs: np.ndarray, contexts: np.ndarray) -> None:
        self._runs, first, self._counts = np.unique(runs, return_index=True, return_counts=True)
        self._contexts, index, self._kinds = np.unique(contexts[first], return_inverse=True, return_counts=True)
        self._totals = np.bincount(index, weights=self._counts)

    def counts_of(self, runs: np.ndarray) -> np.ndarray:
        place, known = _find(self._runs, runs)
        return np.where(known, self._counts[place], 0)

    def followers_of(self, contexts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(t, q) of each context, zero where it was never seen."""
        place, known = _find(self._contexts, contexts)
        return np.where(known, self._totals[place], 0), np.where(known, self._kinds[place], 0)


def compression_gain(texts: Sequence[str], author: Ppm, others: Ppm) -> np.ndarray:
    """Bits per UTF-8 byte that the author's model saves against that of the others; positive is author-like, 0 for an empty text."""
    num_bytes = np.array([len(text.encode()) for text in texts], dtype=float)
    return (others.bits(texts) - author.bits(texts)) / np.maximum(num_bytes, 1)


def num_characters(*references: Sequence[str]) -> int:
    """Different characters of all references, and one for every other."""
    return 1 + len(set(itertools.chain.from_iterable(itertools.chain.from_iterable(references))))


def _laid_out(texts: Sequence[str], order: int) -> tuple[np.ndarray, np.ndarray]:
    """Random-looking 64-bit values of the characters, texts kept apart by `order` marks; and where the characters are."""
    gap = "\0" * order
    codes = np.frombuffer((gap + gap.join(texts)).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    lengths = [len(text) for text in texts]
    is_symbol = np.zeros(len(codes), dtype=bool)
    starts = np.cumsum([order, *(length + order for length in lengths[:-1])]) if lengths else np.zeros(0, dtype=int)
    for start, length in zip(starts, lengths):
        is_symbol[start : start + length] = True
    return _mixed(codes.astype(np.uint64) + np.uint64(1)), is_symbol


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): neighbouring numbers become unrelated ones."""
    values = values * _BASE
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _longer(hashes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Hashes of the runs that end at each place and are one longer."""
    return _shifted(hashes) * _BASE + values


def _shifted(hashes: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, dtype=np.uint64), hashes[:-1]])


def _find(sorted_keys: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    place = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return place, sorted_keys[place] == keys


def _thinned(texts: Sequence[str]) -> list[str]:
    total = sum(len(text) for text in texts)
    step = -(-total // MAX_REFERENCE_CHARACTERS) or 1
    return list(texts[::step])


def _batches(texts: Sequence[str]) -> list[tuple[int, int]]:
    """(start, stop) of consecutive texts of about half a million characters, each at least one text."""
    cuts, held = [0], 0
    for index, text in enumerate(texts):
        if held and held + len(text) > CHARACTERS_PER_BATCH:
            cuts.append(index)
            held = 0
        held += len(text)
    return list(itertools.pairwise([*cuts, len(texts)])) if len(texts) else []
