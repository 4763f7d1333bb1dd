"""The compression witness: probabilities by hand, laws that hold for any text, and what it is for."""

from __future__ import annotations

import math

import numpy as np
import pytest
from small_voices import texts

from giong.evaluation.metrics import compression
from giong.evaluation.metrics.compression import Ppm, compression_gain, num_characters

TEXTS = ["abracadabra", "a cabra"]


def naive_probability(texts: list[str], context: str, symbol: str, num_symbols: int, order: int) -> float:
    """The same recursion, character by character, from the definition."""
    probability = 1 / num_symbols
    padded = ["\0" * order + text for text in texts]
    for length in range(order + 1):
        before = ("\0" * order + context)[len(context) + order - length :]
        followers = [text[i] for text in padded for i in range(order, len(text)) if text[i - length : i] == before]
        if followers:
            kinds = len(set(followers))
            probability = (followers.count(symbol) + kinds * probability) / (len(followers) + kinds)
    return probability


def test_probabilities_by_hand():
    # Reference "aab", three symbols. Order 0: a (2 + 2/3) / 5 = 8/15. Behind a: followed by a and b, so a (1 + 2 * 8/15) / 4 = 31/60.
    model = Ppm(["aab"], num_symbols=3, order=1)
    # At the beginning stands the mark, which was followed by a alone: (1 + 8/15) / 2 = 23/30.
    assert model.bits(["a"]) == pytest.approx(-math.log2(23 / 30))
    assert model.bits(["aa"]) == pytest.approx(-math.log2(23 / 30 * 31 / 60))
    # An unknown character has an even share of what is left at order 0, and what follows it is judged by order 0 alone.
    assert model.bits(["xa"]) == pytest.approx(-math.log2((2 / 15) / 2 * 8 / 15))
    assert model.bits(["", "a"])[0] == 0


@pytest.mark.parametrize("context", ["", "a", "abrac", "zz", "abra cad"])
def test_it_is_the_definition_and_sums_to_one(context):
    symbols = sorted(set("".join(TEXTS)))
    model = Ppm(TEXTS, num_characters(TEXTS))
    found = [2 ** -(model.bits([context + symbol]) - model.bits([context]))[0] for symbol in [*symbols, "§"]]
    assert sum(found) == pytest.approx(1)
    assert found == pytest.approx([naive_probability(TEXTS, context, s, len(symbols) + 1, 5) for s in [*symbols, "§"]])


def test_batches_and_neighbours_change_nothing(monkeypatch):
    model = Ppm(texts("author", 1, 10), 80)
    some = [*texts("plain", 1, 6), "", "一二三", *texts("author", 50, 6)]
    together = model.bits(some)
    monkeypatch.setattr(compression, "CHARACTERS_PER_BATCH", 100)
    assert model.bits(some) == pytest.approx(together)
    assert together == pytest.approx([model.bits([text])[0] for text in some])
    assert model.bits([]).shape == (0,)


def test_a_writer_compresses_himself_best():
    author, other = texts("author", 100, 30), texts("clerk", 200, 30)
    models = (Ppm(author, num_characters(author, other)), Ppm(other, num_characters(author, other)))
    own, others = (compression_gain(texts(voice, 900, 20), *models) for voice in ("author", "clerk"))
    assert own.min() > 0.2 > -0.2 > others.max()
    # A copy of the training text is likelier than anything unseen, which is why a copy needs a gate of its own.
    assert compression_gain(author, *models).mean() > own.mean()
    assert compression_gain(["", "x"], *models) == pytest.approx([0, 0], abs=2)


def test_long_references_are_thinned_out_evenly(monkeypatch):
    monkeypatch.setattr(compression, "MAX_REFERENCE_CHARACTERS", 40)
    assert compression._thinned(["0123456789"] * 8) == ["0123456789"] * 4
    assert np.isfinite(Ppm([str(i) * 10 for i in range(8)], 11).bits(["33"])).all()
