"""Training rows from examples and from raw text; what had to be cut or left out is counted, never silent.

Rows are made in threads, each with a tokenizer of its own, and not in processes: four fifths of the time is spent in the
tokenizer's Rust code, which lets other threads run, while a process would first import transformers for seconds. A tokenizer
is not shared, because its flags (`split_special_tokens`) are set on the object that all threads would see.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain
from typing import TypeVar

import numpy as np
import torch

from giong.contracts import Example
from giong.errors import ModelError
from giong.models.chat_template import ChatFormat
from giong.models.conversation import encode_conversation
from giong.models.load import LoadedModel
from giong.models.row_cache import RowCache
from giong.workspace import content_hash

Item = TypeVar("Item")

ITEMS_PER_THREAD = 500
"""Fewer items take half a second; copying a tokenizer of 150,000 tokens for one more thread takes nearly as long."""
ROWS_VERSION = 1
"""Part of every cache key: counts up when the same text gives other rows."""


@dataclass(frozen=True, slots=True)
class Row:
    """One token sequence. `weights[t]` is the loss weight of predicting token t from those before it; `weights[0]` is 0.

    `name` is what messages call the row (the example's id); empty for rows that nobody named. A row with a `target` (C,) is judged
    as a whole, by what the model's head makes of it: none of its tokens carries loss, and the row counts as 1. Neighbours with the
    same `group` (the two answers of a pair) are never parted, and count as one in a step. `extras` are further numbers for the
    objective, by the name of the tensor that they become: NAME_N has one for each token with loss, NAME_R a single one. With `labels`,
    the tokens that stood there, a token with loss is predicted from its own position and from both sides (encoders).
    """

    input_ids: np.ndarray
    weights: np.ndarray
    name: str = ""
    target: np.ndarray | None = None
    group: int | None = None
    extras: Mapping[str, np.ndarray | float] = field(default_factory=dict)
    labels: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.input_ids.shape != self.weights.shape or self.input_ids.ndim != 1:
            raise ValueError(f"input_ids {self.input_ids.shape} and weights {self.weights.shape} must be equal vectors")
        if len(self.weights) and self.weights[0] != 0:
            raise ValueError("the first token has nothing before it, so its weight must be 0")

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def loss_weight(self) -> float:
        """What the row adds to the weight that a step's loss is divided by."""
        return float(np.abs(self.weights).sum(dtype="float64")) if self.target is None else 1.0


@dataclass(slots=True)
class RowReport:
    """How many rows and tokens there are, and the ids of examples that were too long for `max_seq_length`."""

    num_rows: int = 0
    num_tokens: int = 0
    num_loss_tokens: int = 0
    too_long: list[str] = field(default_factory=list)


def example_rows(
    loaded: LoadedModel, examples: Sequence[Example], cache: RowCache | None = None, *, loss_on: str = "answers"
) -> tuple[list[Row], RowReport]:  # fmt: skip
    """One row per example: loss on the author's answers and their end-of-turn tokens, or what `loss_on` says (`encode_conversation`).

    A row longer than `max_seq_length` is left out and named: cutting it would cut the end-of-turn token.
    """

    def encode(chat: ChatFormat, example: Example) -> list[tuple[np.ndarray, np.ndarray]]:
        if loss_on != "all" and _is_single_answer(example):
            encoded = chat.encode(example.messages, example.answer)
            ids, weights = encoded.input_ids, encoded.weights
        else:
            try:
                ids, weights = encode_conversation(chat, example.conversation, tools=example.tools, loss_on=loss_on)
            except ModelError as error:
                error.place = error.place or example.source or example.id
                raise
        return [(ids, weights)] if len(ids) <= loaded.max_seq_length else []

    def key(example: Example) -> str:
        plain = loss_on != "all" and _is_single_answer(example)
        return content_hash(example.messages, example.answer, *(() if plain else (example.tools, loss_on)))

    keys = [key(example) for example in examples] if cache else []
    parts_of = _made(loaded, examples, encode, keys, cache, "examples")
    report = RowReport(too_long=[example.id for example, parts in zip(examples, parts_of) if not parts])
    rows = [Row(ids, weights, example.id) for example, parts in zip(examples, parts_of) for ids, weights in parts]
    return rows, count_rows(rows, report)


def _is_single_answer(example: Example) -> bool:
    return bool(example.answer) and not example.tools and all(message.role in ("system", "user") for message in example.messages)


def raw_text_rows(loaded: LoadedModel, texts: Sequence[str], cache: RowCache | None = None) -> tuple[list[Row], RowReport]:
    """Rows of raw text for `pretrain`: each text is followed by the end-of-text token and cut at `max_seq_length`.

    A cut text goes on in a further row that repeats one token, so every token but a text's first is predicted once.
    """

    def encode(chat: ChatFormat, text: str) -> list[tuple[np.ndarray, np.ndarray]]:
        ids = chat.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = np.asarray([*ids, chat.tokenizer.eos_token_id], dtype=np.int64)
        parts = [ids[start : start + loaded.max_seq_length] for start in range(0, len(ids) - 1, loaded.max_seq_length - 1)]
        return [(part, np.concatenate([np.zeros(1, np.float32), np.ones(len(part) - 1, np.float32)])) for part in parts]

    keys = [content_hash(text) for text in texts] if cache else []
    rows = [Row(ids, weights) for ids, weights in chain.from_iterable(_made(loaded, texts, encode, keys, cache, "texts"))]
    return rows, count_rows(rows, RowReport())


def rows_identity(loaded: LoadedModel, kind: str) -> str:
    """Hash of everything but the text that a row depends on: tokenizer, template, length, and the libraries that apply them."""
    tokenizer, chat = loaded.tokenizer, loaded.chat
    return content_hash(
        ROWS_VERSION, kind, tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, chat.template, chat.end_token_ids,
        loaded.max_seq_length, version("transformers"), version("tokenizers"),
    )  # fmt: skip


def _made(
    loaded: LoadedModel,
    items: Sequence[Item],
    encode: Callable[[ChatFormat, Item], list],
    keys: Sequence[str],
    cache: RowCache | None,
    kind: str,
) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    if cache is None:
        return encode_items(loaded.chat, items, encode)
    return cache.get(rows_identity(loaded, kind), keys, lambda missing: encode_items(loaded.chat, [items[i] for i in missing], encode))


def encode_items(
    chat: ChatFormat, items: Sequence[Item], encode: Callable[[ChatFormat, Item], list], *, num_threads: int | None = None
) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """What `encode` makes of each item, in their order; in as many threads as torch has, where that pays."""
    num_threads = min(torch.get_num_threads(), len(items) // ITEMS_PER_THREAD) if num_threads is None else num_threads
    if num_threads < 2:
        return [encode(chat, item) for item in items]
    size = -(-len(items) // num_threads)
    parts = [(copy.deepcopy(chat), items[start : start + size]) for start in range(0, len(items), size)]
    with ThreadPoolExecutor(num_threads, thread_name_prefix="rows") as pool:
        made = pool.map(lambda part: [encode(part[0], item) for item in part[1]], parts)
        return list(chain.from_iterable(made))


def count_rows(rows: Sequence[Row], report: RowReport) -> RowReport:
    """Fill in what `report` says of the rows that were made."""
    report.num_rows = len(rows)
    report.num_tokens = sum(len(row) for row in rows)
    report.num_loss_tokens = int(sum(row.weights.sum() for row in rows))
    return report
