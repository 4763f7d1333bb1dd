"""Rows of text: the same from the disk as from the tokenizer and in any number of threads; fetched ahead of the step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from giong.contracts import Example, Message
from giong.engine.feed import WaitClock, batches
from giong.engine.packing import plan_steps
from giong.models.load import LoadedModel
from giong.models.row_cache import RowCache
from giong.models.rows import Row, encode_items, example_rows, raw_text_rows, rows_identity


def example(number: int, answer: str = "") -> Example:
    request = (Message("user", f"Tell me about bridge number {number}."),)
    return Example(f"e{number}", "d", "given", request, answer or f"The bridge {number} was blue, and it was {number * 7} years old.")


EXAMPLES = [example(number) for number in range(12)]


def same(left: Sequence[Row], right: Sequence[Row]) -> bool:
    return len(left) == len(right) and all(
        a.name == b.name and np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.weights, b.weights) for a, b in zip(left, right)
    )


class CountedRows:
    """A RowCache that remembers how many texts it had to ask for."""

    def __init__(self, folder: Path) -> None:
        self.cache, self.asked = RowCache(folder), []

    def get(self, identity: str, keys: Sequence[str], make: Callable) -> list:
        def counted(missing: list[int]) -> list:
            self.asked.append(len(missing))
            return make(missing)

        return self.cache.get(identity, keys, counted)


def test_a_second_run_and_a_larger_pilot_tokenise_only_what_is_new(tiny_model: Callable, tmp_path: Path):
    loaded = tiny_model("qwen2")
    cache = CountedRows(tmp_path)
    small, _ = example_rows(loaded, EXAMPLES[3:9:2], cache)
    again, _ = example_rows(loaded, EXAMPLES[3:9:2], cache)
    large, report = example_rows(loaded, EXAMPLES, cache)
    everything, _ = example_rows(loaded, EXAMPLES[::-1], cache)
    assert cache.asked == [3, 9]
    expected, expected_report = example_rows(loaded, EXAMPLES)
    assert same(small, expected[3:9:2]) and same(again, small)
    assert same(large, expected) and same(everything, expected[::-1])
    assert report == expected_report
    assert report.num_tokens == sum(map(len, large))
    assert [row.name for row in large] == [e.id for e in EXAMPLES]
    # Mapped, not read: the arrays are views of files.
    assert isinstance(large[0].input_ids.base.base, np.memmap) and not large[0].input_ids.flags.writeable


def test_equal_texts_are_stored_once_and_keep_their_names(tiny_model: Callable, tmp_path: Path):
    loaded = tiny_model("llama")
    twins = [EXAMPLES[0], replace(EXAMPLES[0], id="twin"), EXAMPLES[1]]
    cache = CountedRows(tmp_path)
    rows, _ = example_rows(loaded, twins, cache)
    assert cache.asked == [2]
    assert [row.name for row in rows] == ["e0", "twin", "e1"]
    assert same(rows, example_rows(loaded, twins)[0])


def test_what_is_too_long_is_remembered_too(tiny_model: Callable, tmp_path: Path):
    loaded = tiny_model("llama")
    cache = CountedRows(tmp_path)
    given = [EXAMPLES[0], example(99, "far too long " * 400)]
    for _ in range(2):
        rows, report = example_rows(loaded, given, cache)
        assert report.too_long == ["e99"] and len(rows) == 1
    only, report = example_rows(loaded, given[1:], cache)
    assert (only, report.too_long) == ([], ["e99"])
    nothing, _ = example_rows(loaded, [example(98, "far too long " * 500)], cache)
    assert nothing == []
    assert cache.asked == [2, 1]


def test_raw_text_comes_back_in_its_parts(tiny_model: Callable, tmp_path: Path):
    loaded = replace(tiny_model("gpt2"), max_seq_length=16)
    texts = ["The kettle sang before anyone had asked it to. " * 4, "Nobody could say who had painted the bridge.", "x"]
    cache = CountedRows(tmp_path)
    first, report = raw_text_rows(loaded, texts, cache)
    second, _ = raw_text_rows(loaded, texts[::-1], cache)
    expected, expected_report = raw_text_rows(loaded, texts)
    assert len(expected) > len(texts) and report == expected_report
    assert same(first, expected) and len(second) == len(first)
    assert cache.asked == [3]


def test_another_template_tokenizer_or_length_is_another_identity(tiny_model: Callable):
    loaded = tiny_model("qwen2")
    identity = rows_identity(loaded, "examples")
    assert rows_identity(tiny_model("qwen2"), "examples") == identity
    others = [
        rows_identity(loaded, "texts"),
        rows_identity(replace(loaded, max_seq_length=100), "examples"),
        rows_identity(tiny_model("qwen3"), "examples"),
    ]
    loaded.chat.template += " "
    others.append(rows_identity(loaded, "examples"))
    assert len({identity, *others}) == 5


@pytest.mark.parametrize("name", ["index.json", "lengths.npy", "input_ids.npy", "weights.npy"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_what_is_damaged_on_the_disk_is_tokenised_again(tiny_model: Callable, tmp_path: Path, name: str, damage: str):
    loaded = tiny_model("llama")
    cache = CountedRows(tmp_path)
    expected, _ = example_rows(loaded, EXAMPLES, cache)
    expected = [replace(row, input_ids=row.input_ids.copy(), weights=row.weights.copy()) for row in expected]
    (path,) = tmp_path.glob(f"*/*/{name}")
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:-9])
    assert same(example_rows(loaded, EXAMPLES, cache)[0], expected)
    assert cache.asked == [12, 12]


@pytest.mark.parametrize("num_threads", [2, 3, 5])
def test_threads_change_nothing(tiny_model: Callable, num_threads: int):
    """Some answers spell a special token, which is encoded with a flag that is set on the tokenizer itself."""
    loaded: LoadedModel = tiny_model("llama")
    examples = [example(number, "She wrote <|eot_id|> on the wall, and left." if number % 3 == 0 else "") for number in range(40)]

    def encode(chat, given: Example) -> list:  # type: ignore[no-untyped-def]
        encoded = chat.encode(given.messages, given.answer)
        return [(encoded.input_ids, encoded.weights)]

    alone = encode_items(loaded.chat, examples, encode, num_threads=1)
    together = encode_items(loaded.chat, examples, encode, num_threads=num_threads)
    assert len(alone) == len(together) == 40
    for (left,), (right,) in zip(alone, together):
        assert np.array_equal(left[0], right[0]) and np.array_equal(left[1], right[1])


class SlowRows(Sequence[Row]):
    """Rows on a slow disk."""

    def __init__(self, rows: Sequence[Row], seconds: float) -> None:
        self.rows, self.seconds = rows, seconds

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        time.sleep(self.seconds)
        return self.rows[index]


ROWS = [Row(np.full(5, number), np.array([0, 1, 1, 1, 1], dtype=np.float32), f"r{number}") for number in range(10)]


@pytest.mark.parametrize("first", [0, 1, 4, 5])
def test_batches_come_in_the_order_of_the_plan(first: int):
    steps = plan_steps(10, 4, 2, seed=3)
    with closing(batches(ROWS, steps, first)) as feed:
        seen = [(batch.step, [row.name for row in batch.rows]) for batch in feed]
    assert seen == [(step, [f"r{index}" for index in steps[step]]) for step in range(first, 6)]


def test_a_step_waits_only_for_what_its_predecessor_did_not_leave_time_for():
    steps = plan_steps(10, 1, 1, seed=0)
    clock = WaitClock()
    with closing(batches(SlowRows(ROWS, 0.03), steps, 0)) as feed:
        for _ in clock.over(feed):
            pass
    at_once = clock.lap()
    assert at_once > 0.2
    waited = []
    with closing(batches(SlowRows(ROWS, 0.03), steps, 0)) as feed:
        for _ in clock.over(feed):
            waited.append(clock.lap())
            time.sleep(0.15)
    assert sum(waited[2:]) < 0.5 * at_once


def test_a_feed_that_is_left_early_ends():
    started = time.monotonic()
    with closing(batches(SlowRows(ROWS, 0.05), plan_steps(10, 1, 30, seed=0), 0)) as feed:
        next(feed)
    assert time.monotonic() - started < 5
