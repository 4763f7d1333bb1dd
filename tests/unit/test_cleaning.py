"""Cleaning, counting and cutting on hand-counted texts in English, Vietnamese, Chinese and Thai."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from giong.contracts import Document, Passage
from giong.data.cleaning import clean_text, count_words, cut_passages, cut_with_report, deduplicate


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("caf\u0065\u0301", "café"),
        ("I\u2019m \u201cfine\u201d \u2013 truly\u2026", "I\u2019m \u201cfine\u201d \u2013 truly\u2026"),
        ("It\u00e2\u20ac\u2122s mine", "It\u2019s mine"),
        ("zero\u200bwidth, soft\u00adhyphen\ufeff", "zerowidth, softhyphen"),
        ("stray\u200d joiner", "stray joiner"),
        ("\U0001f469\u200d\U0001f4bb and می\u200cروم", "\U0001f469\u200d\U0001f4bb and می\u200cروم"),
        ("two  spaces,\u00a0a\ttab \nand ends \r\n\r\n\r\n\r\nnext", "two spaces, a tab\nand ends\n\nnext"),
        ("，你好！ｆｕｌｌ　width（一）", "，你好！ｆｕｌｌ width（一）"),
        ("ﬁne &amp; <b>bold</b>", "ﬁne &amp; <b>bold</b>"),
        ("", ""),
    ],
)
def test_machines_damage_is_repaired_and_the_authors_marks_stay(before, after):
    assert clean_text(before) == after


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_cleaning_twice_is_cleaning_once(text):
    once = clean_text(text)
    assert clean_text(once) == once


@pytest.mark.parametrize(
    ("text", "num_words"),
    [
        ("", 0),
        ("It's 4 o'clock – isn't it?", 5),
        ("Tôi không biết đi đâu…", 5),
        ("昨天下午", 2),
        ("昨天下午，我", 3),  # five characters, rounded up
        ("我用 Python 写", 3),  # three characters and a word
        ("สวัสดี", 2),  # four letters; the two marks belong to theirs
        ("— … !", 0),
    ],
)
def test_words_are_counted_by_hand(text, num_words):
    assert count_words(text) == num_words


def sentence(number: int, num_words: int) -> str:
    return " ".join([f"S{number}", *(f"w{number}x{index}" for index in range(num_words - 2)), "end."])


def document(*paragraphs: str, doc_id: str = "d") -> Document:
    return Document(doc_id, "\n\n".join(paragraphs), "Title", "2020-01-01")


def check(passages: list[Passage], documents: list[Document], min_words: int, max_words: int) -> None:
    texts = {document.id: document.text for document in documents}
    for passage in passages:
        assert passage.text in texts[passage.document_id]
        assert passage.text == passage.text.strip()
        assert min_words <= count_words(passage.text) <= max_words


def test_paragraphs_are_merged_up_to_the_longest_and_never_split_when_they_fit():
    source = document(sentence(1, 10), sentence(2, 10), sentence(3, 10), sentence(4, 15), sentence(5, 6))
    passages = cut_passages([source], 5, 22)
    assert [count_words(passage.text) for passage in passages] == [20, 10, 21]
    assert passages[0].text == f"{sentence(1, 10)}\n\n{sentence(2, 10)}"
    assert [(p.id, p.index, p.title, p.date) for p in passages] == [(f"d#{i}", i, "Title", "2020-01-01") for i in range(3)]
    check(passages, [source], 5, 22)


def test_without_merging_only_a_short_paragraph_joins_its_neighbour():
    source = document(sentence(1, 10), sentence(2, 10), sentence(3, 3), sentence(4, 30))
    passages, dropped = cut_with_report([source], 5, 40, merge_paragraphs=False)
    assert [count_words(passage.text) for passage in passages] == [10, 13, 30]
    assert not dropped
    check(passages, [source], 5, 40)


def test_a_long_paragraph_is_cut_at_sentence_ends_and_not_after_an_abbreviation():
    text = (
        "We met Dr. Stone at ten and talked about the leak for an hour or so. He knew J. K. and approx. 40 others who had it! "
        "“Was it old?” I asked him on the way out. It was, he said, and laughed."
    )
    passages = cut_passages([Document("d", text)], 5, 20)
    assert [passage.text.split()[0] for passage in passages] == ["We", "He", "I"]
    assert " ".join(passage.text for passage in passages) == text
    check(passages, [Document("d", text)], 5, 20)


def test_chinese_is_cut_after_its_own_full_stops():
    text = "昨天下午我去河边散步。看见一位老人在钓鱼！他坐了三个小时，一条也没有钓到……我问他为什么？他说：“鱼不在，水还在。”然后他笑了。"
    passages = cut_passages([Document("d", text)], 5, 12)
    check(passages, [Document("d", text)], 5, 12)
    assert "".join(passage.text for passage in passages) == text
    assert all(passage.text[-1] in "。！？…”" for passage in passages)
    # Ten words a passage; a full stop inside the quotation ends no sentence before the quotation mark does.
    assert [passage.text[-4:] for passage in passages] == ["在钓鱼！", "为什么？", "他笑了。"]
    assert [p.text for p in cut_passages([Document("d", text[text.index("他说") :])], 2, 5)] == ["他说：“鱼不在，水还在。”", "然后他笑了。"]


def test_vietnamese_is_cut_at_sentence_ends():
    text = (
        "Sáng nay tôi dậy lúc năm giờ, pha một ấm trà rồi ngồi ngoài hiên nhìn mưa. Con mèo nhà bên sang ngủ nhờ trên ghế, ướt như chuột… "
        "Tôi không đuổi nó, vì tôi cũng chẳng biết đi đâu! Ông TP. Nguyễn đi qua, hỏi: “Trời này mà ngồi?” Tôi cười."
    )
    passages = cut_passages([Document("d", text)], 5, 20)
    check(passages, [Document("d", text)], 5, 20)
    assert " ".join(passage.text for passage in passages) == text
    assert [passage.text.split()[0] for passage in passages] == ["Sáng", "Con", "Tôi", "Ông"]


def test_without_punctuation_the_cut_falls_between_words_and_characters():
    spaced = " ".join(f"word{number}" for number in range(50))
    passages = cut_passages([Document("d", spaced)], 5, 20)
    assert [count_words(passage.text) for passage in passages] == [20, 20, 10]
    assert " ".join(passage.text for passage in passages) == spaced
    unspaced = "水" * 90
    passages = cut_passages([Document("d", unspaced)], 5, 20)
    assert [len(passage.text) for passage in passages] == [40, 40, 10]


def test_a_mark_is_never_cut_from_its_letter():
    text = "กี่" * 60
    passages = cut_passages([Document("d", text)], 2, 10)
    assert "".join(passage.text for passage in passages) == text
    assert all(passage.text.startswith("ก") for passage in passages)


def test_a_short_leftover_joins_its_neighbour_or_shares_its_text():
    joins = document(sentence(1, 18), sentence(2, 3), sentence(3, 19))
    passages, dropped = cut_with_report([joins], 5, 22)
    assert [count_words(passage.text) for passage in passages] == [21, 19]
    assert not dropped
    shares = document(f"{sentence(1, 10)} {sentence(2, 10)}", sentence(3, 3))
    passages, dropped = cut_with_report([shares], 5, 20)
    assert [count_words(passage.text) for passage in passages] == [10, 13]
    assert not dropped


def test_what_stays_too_short_is_listed_with_its_line():
    source = document(sentence(1, 20), "Too short.", sentence(2, 20), doc_id="letters/a.txt")
    passages, dropped = cut_with_report([source, document("Alone here.", doc_id="b")], 5, 20)
    assert [count_words(passage.text) for passage in passages] == [20, 20]
    assert [passage.id for passage in passages] == ["letters/a.txt#0", "letters/a.txt#1"]
    assert [(entry.place, entry.num_words) for entry in dropped] == [("letters/a.txt:3", 2), ("b:1", 2)]
    assert "fewer than data.min_words (5)" in dropped[0].reason


def test_every_passage_of_a_random_document_is_a_substring_within_the_limits():
    rng = random.Random(4)
    for trial in range(40):
        paragraphs = []
        for number in range(rng.randint(1, 6)):
            sentences = [sentence(number * 10 + index, rng.randint(2, 30)) for index in range(rng.randint(1, 8))]
            paragraphs.append(rng.choice([" ", "\n"]).join(sentences))
        if trial % 3 == 0:
            paragraphs.append("他坐了三个小时，一条也没有钓到。" * rng.randint(1, 9))
        source = document(*paragraphs)
        passages, dropped = cut_with_report([source], 12, 40)
        check(passages, [source], 12, 40)
        kept = sum(count_words(passage.text) for passage in passages) + sum(entry.num_words for entry in dropped)
        assert abs(kept - count_words(source.text)) <= len(passages)
        positions = [source.text.index(passage.text) for passage in passages if count_words(passage.text) == len(set(passage.text.split()))]
        assert positions == sorted(positions)


def test_texts_that_read_alike_are_kept_once_and_listed():
    items = [Document("a", "Same Text."), Document("b", "Other."), Document("c", "same\n text."), Document("d", "Same text")]
    kept, report = deduplicate(items)
    assert [item.id for item in kept] == ["a", "b", "d"]
    assert report.to_dict() == {"num_given": 4, "num_kept": 3, "duplicates": [("c", "a")]}
    passages = [Passage("a#0", "a", 0, "Ａlike"), Passage("b#0", "b", 0, "Ａlike")]
    assert [item.id for item in deduplicate(passages)[0]] == ["a#0"]
