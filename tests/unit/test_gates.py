"""Every gate on both sides of its threshold."""

from __future__ import annotations

import math
import random
import string

import pytest
from small_voices import texts

from giong.contracts import Reply, TokenScores
from giong.evaluation import gates
from giong.evaluation.metrics.intervals import Interval
from giong.evaluation.metrics.text import CorpusIndex

AUTHOR = texts("author", 10, 40)


def scored(nll: float, num: int = 10, num_bytes: int = 40) -> TokenScores:
    return TokenScores((-nll,) * num, num_bytes)


@pytest.mark.parametrize(("delta", "status"), [(-0.1, "pass"), (0.049, "pass"), (0.1, "warn"), (0.2, "fail")])
def test_forgetting(delta, status):
    gate = gates.forgetting([scored(3 + delta)] * 3, [scored(3.0)] * 3)
    assert gate.status == status
    assert gate.value == pytest.approx(delta)
    assert gates.forgetting(None, [scored(3.0)]).status == "not available"
    assert gates.forgetting([scored(3.0, num=11)], [scored(3.0)]).status == "not available"


def test_collapse_catches_loops_and_not_the_author():
    band = gates.CollapseBand(AUTHOR)
    unseen = texts("author", 400, 40)
    assert gates.collapse(unseen, band, unseen).status == "pass"
    loop = " ".join(["the kettle came back from the harbour again"] * 8)
    assert band.faults(loop) == ["distinct-2", "rep-4", "zlib"]
    # One miss is allowed below 50 replies, two are not.
    clean = [text for text in unseen if not band.faults(text)][:30]
    assert gates.collapse([*clean, loop], band).status == "pass"
    gate = gates.collapse([*clean, loop, loop], band)
    assert gate.status == "fail"
    assert gate.value == pytest.approx(2 / 32)
    assert "2 of 32" in gate.explanation


def test_a_loop_at_the_end_of_a_long_text_is_found():
    band = gates.CollapseBand(AUTHOR)
    start = next(text for text in texts("author", 400, 40) if not band.faults(text))
    assert "rep-4" in band.faults(start + " and so on and so on" * 30)


def test_letter_salad_leaves_the_compression_band():
    draw = random.Random(0)
    salad = " ".join("".join(draw.choice(string.ascii_letters + string.digits) for _ in range(5)) for _ in range(60))
    assert gates.CollapseBand(AUTHOR).faults(salad) == ["zlib"]


def test_end_of_turn():
    good, cut, empty = Reply("yes"), Reply("and", "length"), Reply("  ")
    assert gates.end_of_turn([good] * 39 + [cut]).status == "pass"
    assert gates.end_of_turn([good] * 38 + [cut] * 2).status == "fail"
    assert gates.end_of_turn([good] * 98 + [cut] * 2).status == "pass"
    assert gates.end_of_turn([good] * 97 + [cut] * 3).status == "fail"
    assert gates.end_of_turn([good] * 38 + [empty] * 2).status == "fail"


def test_length():
    own = ["word " * num for num in range(40, 60)]
    assert gates.length(own, own).status == "pass"
    talkative = gates.length([text * 2 for text in own], own)
    assert talkative.status == "fail"
    assert talkative.value == pytest.approx(math.log(2))
    assert gates.length([text[: len(text) // 2] for text in own], own).status == "fail"
    # The right median with far too little spread.
    assert gates.length(["word " * 50] * 40, ["word " * (10 + 2 * i) for i in range(40)]).status == "warn"


def test_overlap_and_longest_copy():
    corpus = CorpusIndex(AUTHOR)
    unseen = ["nothing of this was ever said by anybody in that small town before"] * 30
    own = [corpus.share_copied(text) for text in unseen]
    assert gates.overlap(own, own).status == "pass"
    copied = gates.overlap([*own[:-1], 1.0], own)
    assert copied.status == "fail"
    assert copied.value == pytest.approx(1 / 30)
    assert gates.longest_copy(unseen, corpus).status == "pass"
    tokens = AUTHOR[0].split()
    assert gates.longest_copy([" ".join(tokens[:26])], corpus).status == "warn"
    assert gates.longest_copy([AUTHOR[0]], corpus).status == "fail"


def interval(low: float, high: float) -> Interval:
    return Interval((low + high) / 2, low, high)


@pytest.mark.parametrize(
    ("chrf", "recall", "status"),
    [
        (interval(-1, 3), interval(-0.02, 0.02), "pass"),
        (interval(-9, 3), interval(-0.02, 0.02), "pass"),
        (interval(-9, -3), interval(-0.02, 0.02), "warn"),
        (interval(1, 3), interval(-0.3, -0.1), "fail"),
        (interval(-9, 3), interval(-0.1, 0.1), "warn"),
        (interval(-9, -3), None, "fail"),
        (interval(-9, -3), interval(-0.1, 0.1), "fail"),
        (None, None, "not available"),
    ],
)
def test_meaning(chrf, recall, status):
    assert gates.meaning(chrf, recall, "few_shot").status == status


def test_coherence_is_two_sided():
    author = [scored(2 + 0.02 * i) for i in range(40)]
    assert gates.coherence([scored(2.4)] * 10, author).status == "pass"
    assert gates.coherence([scored(0.5)] * 10, author).status == "fail"
    assert gates.coherence([scored(6.0)] * 10, author).status == "fail"
    assert gates.coherence([scored(2.4)] * 8 + [scored(5.0)] * 2, author).status == "warn"
    assert "not checked" in gates.coherence(None, author).explanation
    blind = gates.coherence([scored(6.0)] * 10, author, "The base has not read this language.")
    assert (blind.status, blind.value, blind.explanation) == ("not available", None, "The base has not read this language.")
    assert gates.bits_per_byte(scored(math.log(2), num=8, num_bytes=8)) == pytest.approx(1)
