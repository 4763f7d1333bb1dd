"""Counting words, repetition and copies, by hand."""

from __future__ import annotations

import random
import zlib

import pytest

from giong.evaluation.metrics.text import (
    CorpusIndex,
    cut_windows,
    distinct_n,
    length_ratio,
    mostly_unspaced,
    ngrams,
    overlap_length,
    rep_n,
    words,
    zlib_ratio,
)


def test_words_of_spaced_and_unspaced_scripts():
    assert words("Don't PANIC, it's 3 o'clock!") == ["don't", "panic", "it's", "3", "o'clock"]
    assert words("我们去 Hanoi。") == ["我", "们", "去", "hanoi"]
    assert words("Tôi ở Hà Nội.") == ["tôi", "ở", "hà", "nội"]
    assert mostly_unspaced("我们去河内旅行")
    assert not mostly_unspaced("Tôi ở Hà Nội")
    assert not mostly_unspaced("")


def test_repetition_by_hand():
    tokens = ["a", "b", "a", "b", "a"]
    assert ngrams(tokens, 2) == [("a", "b"), ("b", "a"), ("a", "b"), ("b", "a")]
    assert distinct_n(tokens, 2) == 0.5
    assert rep_n(tokens, 2) == 0.5
    # a b a b a b a b: five 4-grams, two different ones.
    assert rep_n(["a", "b"] * 4, 4) == pytest.approx(0.6)
    assert rep_n(["a", "b"], 4) == 0


def test_a_loop_compresses_more_than_prose():
    text = "the quick brown fox jumps over one lazy dog and then sleeps "
    assert zlib_ratio(text) == len(text) / len(zlib.compress(text.encode(), 9))
    assert zlib_ratio(text * 10) > 5 > zlib_ratio(text)
    assert zlib_ratio("") == 0


def test_length_ratio_counts_two_characters_as_a_word():
    assert length_ratio("one two three", "one two") == 1.5
    assert length_ratio("我们去河内", "我们去河内旅行啊啊啊") == pytest.approx(3 / 5)
    assert length_ratio("", "one two") == 0.25


def test_windows_keep_every_word_and_join_a_short_rest():
    text = "one two three four five six seven."
    assert cut_windows(text, 3) == ["one two three", "four five six seven."]
    assert cut_windows(text, 4) == ["one two three four", "five six seven."]
    assert cut_windows("", 4) == []


def test_copied_runs_are_found_where_they_are_and_only_there():
    corpus = CorpusIndex(["a b c d e f g h i j", "k l m n o p"])
    assert corpus.longest_run("x c d e f y") == 4
    # The run does not go on from one text into the next.
    assert corpus.longest_run("i j k l") == 2
    assert corpus.longest_run("") == 0
    assert corpus.longest_run("z z") == 0
    # Windows of three: b c d, c d x, d x y: one of three is copied.
    assert corpus.share_copied("b c d x y", n=3) == pytest.approx(1 / 3)
    # What the request says itself is no leak.
    assert corpus.share_copied("b c d x y", request="say B, C, D!", n=3) == 0
    assert corpus.share_copied("a b c d e f g h i") == 1
    assert corpus.share_copied("a b") == 0
    assert overlap_length("plain words here") == 8
    assert overlap_length("我们去河内旅行") == 16


def test_the_longest_run_agrees_with_brute_force():
    draw = random.Random(0)
    corpus_tokens = [draw.choice("abcd") for _ in range(300)]
    corpus = CorpusIndex([" ".join(corpus_tokens)])
    runs = {size: set(ngrams(corpus_tokens, size)) for size in range(1, 20)}
    for _ in range(30):
        tokens = [draw.choice("abcd") for _ in range(20)]
        expected = max(size for size in runs if any(gram in runs[size] for gram in ngrams(tokens, size)))
        assert corpus.longest_run(" ".join(tokens)) == expected
