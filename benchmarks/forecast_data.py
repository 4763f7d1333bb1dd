"""The data sets of the calibration study: pairs of request and answer by several writers, split by document.

All of it is bundled, or read from files that are named. Where no request is recorded the stand-in writes it by rules, so that
the study needs no teacher; what is measured is how well a curve is continued, and not how good the requests are.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from giong import samples
from giong.config import DataConfig, SynthesisKind
from giong.contracts import Document, Example
from giong.data.cleaning import cut_passages
from giong.data.examples import spread
from giong.data.synthesis.kinds import KINDS
from giong.data.synthesis.stand_in import question

HELD_OUT_SHARE = 0.25
MAX_HELD_OUT = 24
MAX_TRAIN = 64
"""Rows of the largest training, so that all of the study's trainings take about a quarter of an hour on two cores."""
MAX_SIZES = 6
MIN_ROWS = 2


@dataclass(frozen=True)
class DataSet:
    """One writer and one kind of request; `train` and `held_out` share no document."""

    name: str
    train: list[Example]
    held_out: list[Example]

    @property
    def sizes(self) -> list[int]:
        """Numbers of rows to train on: all, half, a quarter and so on, smallest first."""
        found = [len(self.train)]
        while len(found) < MAX_SIZES and found[-1] // 2 >= MIN_ROWS:
            found.append(found[-1] // 2)
        return found[::-1]


def data_set(name: str, kind: SynthesisKind, rows: Sequence[tuple[str, str, str]], max_train: int = MAX_TRAIN) -> DataSet:
    """Split (document, request, answer) rows by document; the split is the same in every run."""
    documents = sorted({document for document, _, _ in rows})
    random.Random(name).shuffle(documents)
    held_out = set(documents[: max(2, round(HELD_OUT_SHARE * len(documents)))])
    examples = [
        Example(f"{document}-{index}", document, kind, KINDS[kind].training_messages(request, drop_instruction=False), answer)
        for index, (document, request, answer) in enumerate(rows)
    ]
    train = [example for example in examples if example.document_id not in held_out]
    random.Random(name).shuffle(train)
    test = [example for example in examples if example.document_id in held_out]
    return DataSet(name, train[:max_train], spread(test, MAX_HELD_OUT))


def bundled() -> list[DataSet]:
    """Two authors (the English one with two kinds of request), the eight other voices pooled, and each of those alone."""
    english, vietnamese, voices = samples.author_rows(), samples.vietnamese_author_rows(), samples.background_voices()
    asked = {voice: [(f"{voice}-{index}", question(text), text) for index, text in enumerate(texts)] for voice, texts in voices.items()}
    return [
        data_set("author, question", "question", [(row["document_id"], question(row["text"]), row["text"]) for row in english]),
        data_set("author, rewrite", "neutral_rewrite", [(row["document_id"], row["neutral_rewrite"], row["text"]) for row in english]),
        # Its rows have three times the tokens.
        data_set(
            "Vietnamese author, translation", "translation", [(row["document_id"], row["translation"], row["text"]) for row in vietnamese],
            MAX_TRAIN // 2,
        ),
        data_set("eight voices, question", "question", [row for rows in asked.values() for row in rows]),
        *(data_set(f"{voice}, question", "question", rows) for voice, rows in asked.items()),
    ]  # fmt: skip


def from_files(folder: Path) -> list[DataSet]:
    """One data set per .jsonl or .jsonl.gz file of a folder: rows with a `text`, and optionally `id`, cut into passages."""
    made = []
    settings = DataConfig()
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")]):
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as stream:
            rows = [json.loads(line) for line in stream]
        documents = [Document(str(row.get("id", number)), row["text"]) for number, row in enumerate(rows)]
        passages = cut_passages(documents, settings.min_words, settings.max_words)
        random.Random(path.name).shuffle(passages)
        chosen = passages[: 2 * MAX_TRAIN]
        name = f"{path.name.partition('.')[0]}, question"
        made.append(data_set(name, "question", [(passage.document_id, question(passage.text), passage.text) for passage in chosen]))
    return made
