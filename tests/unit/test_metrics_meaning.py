"""What a request holds that a reply must hold, by hand; and the meaning controls."""

from __future__ import annotations

import math

import pytest

from giong.evaluation.metrics.meaning import chrf_corpus, chrf_scores, closed_words, count_facts, key_add, key_items, key_recall


def test_key_items_of_each_kind():
    text = 'Yesterday Marta paid 1,250 euros on 2024-03-05. See https://example.org/a?b=1. She said "never again" to old Tom.'
    assert key_items(text, frozenset({"said"})) == {
        ("url", "https://example.org/a?b=1"), ("date", "2024-3-5"), ("number", "1250"), ("quote", "never again"),
        ("name", "marta"), ("name", "tom"),
        ("word", "yesterday"), ("word", "paid"), ("word", "euros"), ("word", "never"), ("word", "again"),
    }  # fmt: skip


def test_key_recall_by_hand():
    request = "In 1998 the gardener repaired an old fence near Leeds."
    # 1998, gardener, repaired, fence, near, Leeds
    assert len(key_items(request)) == 6
    assert key_recall(request, "In 1998 a gardener had repaired that fence near Leeds") == 1
    # Stems count (gardeners, repairs, fences); "near" is missing and 1999 is another number.
    assert key_recall(request, "Gardeners of Leeds, doing repairs on fences in 1999") == pytest.approx(4 / 6)
    assert key_recall(request, "") == 0
    assert math.isnan(key_recall("", "anything"))
    # Leeds, gardener and fence are in the request, the dragon is not.
    assert key_add(request, "The gardener of Leeds saw a dragon on a fence") == pytest.approx(1 / 4)


def test_dates_and_numbers_may_be_written_otherwise():
    assert key_recall("on 2024-03-05", "on 5 March 2024") == 1
    assert key_recall("on 2024-03-05", "on 6 March 2024") == 0
    assert key_recall("1,000 of 3.5", "1000 of 3.5") == 1


def test_facts_that_the_request_does_not_hold():
    request, answer = "Tell me about the mill at Harrow.", "The mill at Harrow was built in 1874 by Ada Lunt, and fed 212 people."
    assert count_facts(request, answer, "It was built in 1874 for 300 people by a man called Lunt.") == (5, 4, 2)
    assert count_facts(request, answer, answer) == (5, 4, 4)
    assert count_facts(answer, answer, "") == (5, 0, 0)


def test_closed_words_are_derived_by_frequency():
    requests = [f"Rewrite this text please about {thing}" for thing in ("kettles", "ladders", "violins", "anchors")]
    closed = closed_words(requests)
    assert {"rewrite", "this", "text", "about"} <= closed
    assert "kettles" not in closed
    assert key_items(requests[0], closed) == {("word", "kettles")}
    assert closed_words(requests[:2]) == frozenset()


def test_unspaced_and_syllabic_scripts():
    # 去河 河内 内旅 旅行
    assert {value for _, value in key_items("去河内旅行")} == {"去河", "河内", "内旅", "旅行"}
    assert key_recall("去河内旅行", "我喜欢河内旅行") == pytest.approx(3 / 4)
    # Vietnamese syllables are short and match exactly.
    assert key_recall("mẹ nấu phở ở nhà", "nhà của mẹ có phở") == pytest.approx(3 / 4)


def test_meaning_controls():
    author = "Well now, old Marta mended the kettle twice by the harbour, and nobody thanked her."
    other = "I do like a library of an evening when Oleg is out with his ladder."
    request = "Marta repaired the kettle two times at the harbour. Nobody said thanks."
    surplus = author + " And then, as these things go, there was more to be said of it, and more was said, by all of us, for hours."
    shuffled = "her thanked nobody and harbour the by twice kettle the mended Marta old now Well"
    identity, copy, line, mixed, longer = chrf_scores([author, request, other, shuffled, surplus], [author] * 5)
    assert identity == pytest.approx(100)
    assert chrf_corpus([author], [author]) == pytest.approx(100)
    # chrF++ alone ranks a shuffled or rambling text above an honest copy of the input, hence the other measures.
    assert line < copy < mixed < identity
    assert copy < longer
    assert key_recall(request, request) == 1
    assert key_recall(request, other) == 0
    assert 0.3 < key_recall(request, author) < 1
