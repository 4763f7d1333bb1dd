"""The split: whole documents, the shares asked for, no text on two sides, and a test side that stays as it was frozen."""

from __future__ import annotations

import dataclasses
import json

import pytest

from giong.config import DataConfig
from giong.contracts import Passage
from giong.data.split import _with_hashes, describe, freeze, load_split, split_documents, update_split
from giong.errors import DataError


def passage(document: str, index: int = 0, text: str | None = None, date: str = "") -> Passage:
    return Passage(f"{document}#{index}", document, index, text or f"Text {index} of {document}.", date=date)


def corpus(sizes: dict[str, int], dated: bool = False) -> list[Passage]:
    return [
        passage(document, index, date=f"2020-01-{number:02d}" if dated else "")
        for number, (document, size) in enumerate(sizes.items(), start=1)
        for index in range(size)
    ]


TWENTY = {f"d{number:02d}": 1 + number % 5 for number in range(20)}


@pytest.mark.parametrize("seed", range(5))
def test_whole_documents_go_to_one_side_and_shares_come_near(seed):
    passages = corpus(TWENTY)
    config = DataConfig(seed=seed, test_share=0.3, calibration_share=0.2)
    split = split_documents(passages, config)
    assert sorted([*split.train, *split.calibration, *split.test]) == sorted(TWENTY)
    num_passages = {side: sum(TWENTY[d] for d in split.documents(side)) for side in ("train", "calibration", "test")}
    # 60 passages, documents of at most 5: a greedy side ends within half of the largest document
    assert abs(num_passages["test"] - 18) <= 2.5
    assert abs(num_passages["calibration"] - 12) <= 2.5
    for side in ("train", "calibration", "test"):
        assert {p.document_id for p in split.passages(side, passages)} == set(split.documents(side))
        assert len(split.passages(side, passages)) == num_passages[side]
        assert all(split.side_of(p) == side for p in split.passages(side, passages))
    assert split == split_documents(passages, config)


def test_the_seed_decides_the_draw():
    passages = corpus(TWENTY)
    assert len({tuple(split_documents(passages, DataConfig(seed=seed)).test) for seed in range(4)}) > 1


def test_by_date_the_newest_are_the_test_and_the_next_calibrate():
    passages = corpus(dict.fromkeys("abcdefghij", 2), dated=True)
    split = split_documents(passages, DataConfig(split="date", test_share=0.3, calibration_share=0.2))
    assert (split.test, split.calibration, split.train) == (["h", "i", "j"], ["f", "g"], ["a", "b", "c", "d", "e"])


def test_documents_without_a_date_are_counted():
    passages = [*corpus(dict.fromkeys("abcd", 2), dated=True), passage("e"), passage("f")]
    with pytest.raises(DataError, match=r"2 of 6 documents have no date \(first: e\)") as caught:
        split_documents(passages, DataConfig(split="date"))
    assert caught.value.place == "data.split"
    assert "`date:`" in caught.value.remedy
    assert "data.split: document" in caught.value.remedy


@pytest.mark.parametrize("num_documents", [0, 1, 2])
def test_fewer_than_three_documents_cannot_be_split(num_documents):
    passages = corpus(dict.fromkeys("ab"[:num_documents], 5))
    with pytest.raises(DataError, match="needs at least 3: one to train on, one to calibrate with, one to test on") as caught:
        split_documents(passages, DataConfig())
    assert caught.value.message.startswith(f"{num_documents} document")
    assert "cut one long text into files" in caught.value.remedy


@pytest.mark.parametrize("method", ["document", "date"])
def test_three_documents_give_one_to_each_side_whatever_their_size(method):
    for sizes in ({"a": 1, "b": 30, "c": 1}, {"a": 30, "b": 1, "c": 1}, {"a": 5, "b": 5, "c": 50}):
        split = split_documents(corpus(sizes, dated=True), DataConfig(split=method))
        assert sorted(map(len, (split.train, split.calibration, split.test))) == [1, 1, 1]


def update_sides(split, passages, config):
    """The same documents on the same sides over other passages, as if they had been drawn with them."""
    return _with_hashes({"train": split.train, "calibration": split.calibration, "test": split.test}, passages, config)


def test_a_text_on_two_sides_stays_on_the_more_protected_one():
    split = split_documents(corpus(TWENTY), DataConfig())
    test, calibration, train = split.test[0], split.calibration[0], split.train[0]
    copies = [
        passage(test, 90, "The same text."),
        passage(calibration, 91, "the  same TEXT."),
        passage(train, 92, "The same text."),
        passage(calibration, 93, "Another."),
        passage(train, 94, "Another."),
    ]
    grown = update_sides(split, [*corpus(TWENTY), *copies], DataConfig())
    assert grown.removed == {f"{calibration}#91": f"{test}#90", f"{train}#92": f"{test}#90", f"{train}#94": f"{calibration}#93"}
    hashes = [value for side in grown.passage_hashes.values() for value in side.values()]
    assert len(hashes) == len(set(hashes))
    assert grown.side_of(copies[2]) is None


def test_copies_that_empty_a_side_are_an_error():
    passages = [passage(document, 0, "All alike.") for document in "abc"]
    with pytest.raises(DataError, match="side is empty") as caught:
        split_documents(passages, DataConfig())
    assert "data.seed" in caught.value.remedy


def test_a_frozen_split_comes_back_as_it_was(tmp_path):
    passages = corpus(TWENTY)
    split = split_documents(passages, DataConfig())
    freeze(split, tmp_path / "split.json")
    assert load_split(tmp_path / "split.json", passages) == split
    counts = describe(split)
    assert counts["test"] == {"num_documents": len(split.test), "num_passages": len(split.passage_hashes["test"])}


def test_a_changed_or_missing_passage_of_a_frozen_split_is_named(tmp_path):
    path = tmp_path / "split.json"
    passages = corpus(TWENTY)
    split = split_documents(passages, DataConfig())
    freeze(split, path)
    first = f"{split.test[0]}#0"
    changed = [dataclasses.replace(p, text=p.text + " ") if p.id == first else p for p in passages]
    with pytest.raises(DataError, match=f"1 passages of the frozen test side changed: '{first}' was changed") as caught:
        load_split(path, changed)
    assert caught.value.place == str(path)
    assert "delete data/split.json" in caught.value.remedy
    with pytest.raises(DataError, match="is gone"):
        load_split(path, [p for p in passages if p.id != first])
    with pytest.raises(DataError, match="is new in a frozen document"):
        load_split(path, [*passages, passage(split.test[0], 99)])
    with pytest.raises(DataError, match=r"1 documents are not in the frozen split \(first: new\)") as caught:
        load_split(path, [*passages, passage("new")])
    assert "giong import" in caught.value.remedy


def test_a_split_file_changed_by_hand_is_refused(tmp_path):
    path = tmp_path / "split.json"
    freeze(split_documents(corpus(TWENTY), DataConfig()), path)
    content = json.loads(path.read_text())
    content["train"].append(content["test"].pop())
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="changed by hand") as caught:
        load_split(path)
    assert caught.value.place == str(path)
    path.write_text("{broken")
    with pytest.raises(DataError, match="Not valid JSON"):
        load_split(path)


def test_new_documents_train_and_the_test_stays_frozen():
    config = DataConfig()
    passages = corpus(TWENTY)
    old = split_documents(passages, config)
    train_id = f"{old.train[0]}#0"
    edited = [dataclasses.replace(p, text="Edited since.") if p.id == train_id else p for p in passages]
    copy_of_test = next(p.text for p in passages if p.id == f"{old.test[0]}#0")
    new = update_split(old, [*edited, passage("new", 0), passage("new", 1, copy_of_test)], config)
    assert (new.test, new.calibration) == (old.test, old.calibration)
    assert all(new.passage_hashes[side] == old.passage_hashes[side] for side in ("test", "calibration"))
    assert new.train == [*old.train, "new"]
    assert new.removed == {"new#1": f"{old.test[0]}#0"}
    assert new.passage_hashes["train"][train_id] != old.passage_hashes["train"][train_id]


@pytest.mark.parametrize("side", ["test", "calibration"])
def test_an_edit_or_a_withdrawal_on_a_held_out_side_is_an_error(side):
    config = DataConfig()
    passages = corpus(TWENTY)
    old = split_documents(passages, config)
    document = old.documents(side)[0]
    with pytest.raises(DataError, match=f"frozen {side} side changed"):
        update_split(old, [p for p in passages if p.document_id != document], config)
    with pytest.raises(DataError, match=f"frozen {side} side changed"):
        update_split(old, [dataclasses.replace(p, text=p.text.upper()) if p.document_id == document else p for p in passages], config)


def test_a_copy_inside_the_test_that_is_edited_does_not_enter_the_test_unseen():
    config = DataConfig()
    passages = corpus(TWENTY)
    drawn = split_documents(passages, config)
    document = drawn.test[0]
    copy = passage(document, 50, passages[[p.id for p in passages].index(f"{document}#0")].text)
    old = update_sides(drawn, [*passages, copy], config)
    assert old.removed == {copy.id: f"{document}#0"}
    assert update_split(old, [*passages, copy], config) == old
    with pytest.raises(DataError, match=f"'{document}#50' was changed"):
        update_split(old, [*passages, dataclasses.replace(copy, text="Now its own.")], config)


@pytest.mark.parametrize(("setting", "value"), [("split", "date"), ("seed", 5), ("test_share", 0.4), ("calibration_share", 0.3)])
def test_settings_that_ask_for_another_split_are_not_ignored(setting, value):
    passages = corpus(TWENTY, dated=True)
    old = split_documents(passages, DataConfig())
    with pytest.raises(DataError, match=f"was drawn with data.{setting}: .*, not {value}") as caught:
        update_split(old, passages, DataConfig(**{setting: value}))
    assert caught.value.place == f"data.{setting}"
    assert "Put it back" in caught.value.remedy
