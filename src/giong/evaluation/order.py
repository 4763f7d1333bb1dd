"""Can a model tell order in this author's language? That is asked before its likelihood may say anything about coherence.

A base that has read no Vietnamese finds any Vietnamese unlikely, in whatever order, and so lets through what it is there to stop. It is
tested on the author's held-out texts against their own shuffle: no list of languages says what a model has read. Where it fails, pools
are judged by a model of the characters of the training text and the background, tested alike: it sees where spans were joined, and
nothing of what sentences say together.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from giong.contracts import TokenScores
from giong.evaluation.controls import shuffled_spans
from giong.evaluation.gates import THRESHOLDS
from giong.evaluation.metrics.compression import Ppm, num_characters
from giong.evaluation.metrics.intervals import wilson
from giong.sizing.interval import Interval

BitsPerByte = Callable[[Sequence[str]], np.ndarray]
"""Of N texts, shape (N,), under some model."""
BASE, CHARACTERS = "base", "characters"
"""Who was tested: the untuned base; the model of characters in its place."""

NUM_ORDERS = 4
"""Shuffles of a text: one may happen to join its spans well or badly, and the gain over it varies as much by that as by the text."""


def disordered(text: str) -> tuple[str, ...]:
    """The text's five-word spans in other orders, the same for the same text: what its likelihood is compared with.

    Hard words make a text unlikely, but not less likely than its own shuffles.
    """
    return tuple(shuffled_spans(text, random.Random(f"{number} {text}")) for number in range(NUM_ORDERS))


def together(scores: Sequence[TokenScores]) -> list[TokenScores]:
    """The scores of all shuffles of a text as one, for each `NUM_ORDERS` in a row: their bits per byte are the mean."""
    of_texts = [scores[start : start + NUM_ORDERS] for start in range(0, len(scores), NUM_ORDERS)]
    return [TokenScores(tuple(chain.from_iterable(row.logprobs for row in rows)), sum(row.num_bytes for row in rows)) for rows in of_texts]


@dataclass(frozen=True, slots=True)
class OrderTest:
    """`num_likelier` of `num_texts` texts that a model has not read it finds likelier than their spans in another order; `share` has the
    95 % Wilson interval."""

    num_texts: int
    num_likelier: int
    share: Interval

    @property
    def passed(self) -> bool:
        return self.share.low >= THRESHOLDS.order_share

    @property
    def undecided(self) -> bool:
        """Not shown, and not for what was found but for the few texts."""
        return not self.passed and not self.share.point < THRESHOLDS.order_share

    @property
    def figures(self) -> str:
        share = self.share
        of = f"{self.num_likelier} of {self.num_texts} held-out texts of the author likelier than their own spans in another order"
        return of + (f" ({share.point:.0%} [{share.low:.0%} to {share.high:.0%}])" if self.num_texts else "")

    def why_not_measured(self, base_model: str) -> str:
        """The sentence that stands where coherence would, with the remedy; empty where the base passed."""
        if self.passed:
            return ""
        found = f"Coherence cannot be measured: the base {base_model} finds {self.figures}"
        if self.undecided:
            return f"{found}, too few to show that it tells order in this language. More held-out texts would decide it: 16 do where all are likelier."
        return (
            f"{found}, where {THRESHOLDS.order_share:.0%} have to be certain: it hardly tells order in this language. "
            "Take a base that has read it (model.name_or_path)."
        )


def order_test(texts: Sequence[str], bits: np.ndarray, disordered_bits: np.ndarray) -> OrderTest:
    """How a model orders these texts, by bits per byte of them and (mean) of their `disordered` twins, shape (N,); a text counts once, and
    only if it has another order."""
    likelier = {
        text: shuffled > own for text, own, shuffled in zip(texts, bits, disordered_bits, strict=True) if {*disordered(text)} != {text}
    }
    return OrderTest(len(likelier), sum(map(bool, likelier.values())), wilson(sum(map(bool, likelier.values())), len(likelier)))


def both_orders(texts: Sequence[str], bits: BitsPerByte) -> tuple[np.ndarray, np.ndarray]:
    """Bits per byte of the texts, and the mean of their `disordered` twins'."""
    twins = bits([twin for text in texts for twin in disordered(text)])
    return bits(texts), twins.reshape(-1, NUM_ORDERS).mean(1)


def character_bits(texts: Sequence[str]) -> BitsPerByte:
    """What other texts cost under a model of the characters of these; NaN for an empty text."""
    model = Ppm(texts, num_characters(texts))

    def bits_per_byte(others: Sequence[str]) -> np.ndarray:
        num_bytes = np.array([len(text.encode()) or np.nan for text in others])
        return model.bits(others) / num_bytes

    return bits_per_byte
