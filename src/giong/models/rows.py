"""Training rows from examples and from raw text; what had to be cut or left out is counted, never silent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from giong.contracts import Example
from giong.models.load import LoadedModel


@dataclass(frozen=True, slots=True)
class Row:
    """One token sequence. `weights[t]` is the loss weight of predicting token t from those before it; `weights[0]` is 0."""

    input_ids: np.ndarray
    weights: np.ndarray

    def __post_init__(self) -> None:
        if self.input_ids.shape != self.weights.shape or self.input_ids.ndim != 1:
            raise ValueError(f"input_ids {self.input_ids.shape} and weights {self.weights.shape} must be equal vectors")
        if len(self.weights) and self.weights[0] != 0:
            raise ValueError("the first token has nothing before it, so its weight must be 0")

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(slots=True)
class RowReport:
    """How many rows and tokens there are, and the ids of examples that were too long for `max_seq_length`."""

    num_rows: int = 0
    num_tokens: int = 0
    num_loss_tokens: int = 0
    too_long: list[str] = field(default_factory=list)


def example_rows(loaded: LoadedModel, examples: Sequence[Example]) -> tuple[list[Row], RowReport]:
    """One row per example: loss on the author's answer and its end-of-turn token only.

    A row longer than `max_seq_length` is left out and named: cutting it would cut the end-of-turn token.
    """
    rows, report = [], RowReport()
    for example in examples:
        encoded = loaded.chat.encode(example.messages, example.answer)
        if len(encoded.input_ids) > loaded.max_seq_length:
            report.too_long.append(example.id)
            continue
        rows.append(Row(encoded.input_ids, encoded.weights))
    return rows, _count(rows, report)


def raw_text_rows(loaded: LoadedModel, texts: Sequence[str]) -> tuple[list[Row], RowReport]:
    """Rows of raw text for `pretrain`: each text is followed by the end-of-text token and cut at `max_seq_length`.

    A cut text goes on in a further row that repeats one token, so every token but a text's first is predicted once.
    """
    rows = []
    for text in texts:
        ids = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = np.asarray([*ids, loaded.tokenizer.eos_token_id], dtype=np.int64)
        for start in range(0, len(ids) - 1, loaded.max_seq_length - 1):
            part = ids[start : start + loaded.max_seq_length]
            weights = np.ones(len(part), dtype=np.float32)
            weights[0] = 0.0
            rows.append(Row(part, weights))
    return rows, _count(rows, RowReport())


def _count(rows: Sequence[Row], report: RowReport) -> RowReport:
    report.num_rows = len(rows)
    report.num_tokens = sum(len(row) for row in rows)
    report.num_loss_tokens = int(sum(row.weights.sum() for row in rows))
    return report
