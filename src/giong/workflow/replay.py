"""Replay: general text mixed in among the author's rows, so that what the base could do is practised along with the new voice.

One decision a reader may question: the share is one of the loss, which is what pulls, and not of rows or tokens. Texts are cut to pieces
no longer than the author's rows: a step that met one long text would be about nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from giong import samples
from giong.config import DataConfig
from giong.data.importers import import_documents
from giong.models.row_cache import RowCache
from giong.models.rows import Row, raw_text_rows
from giong.workflow.story import Story
from giong.workspace import content_hash


def replay_path(story: Story) -> Path | None:
    """The user's own text, relative to the project; None for the bundled one."""
    path = story.config.train.replay_path
    return (story.project.root / Path(path).expanduser()).resolve() if path else None


def replay_texts(story: Story) -> list[str]:
    """The texts that are mixed in. Raises DataError for a path that is not there or holds no prose."""
    path = replay_path(story)
    return samples.replay_texts() if path is None else [document.text for document in import_documents([path], DataConfig())[0]]


def replay_hash(story: Story) -> list[str]:
    """What a run's key has to hold of them: nothing where none are mixed in."""
    return [content_hash(replay_texts(story))] if story.config.train.replay_share else []


def replay_rows(story: Story, rows: Sequence[Row]) -> list[Row]:
    """Rows of general text that make up `train.replay_share` of the loss beside `rows`; drawn by the seed, none twice."""
    share = story.config.train.replay_share
    if not share:
        return []
    wanted = share / (1 - share) * sum(float(row.weights.sum()) for row in rows)
    cache = RowCache(story.project.root / "cache" / "rows")
    pieces = cut(raw_text_rows(story.local.loaded, replay_texts(story), cache)[0], max(len(row) for row in rows))
    chosen: list[Row] = []
    for index in np.random.Generator(np.random.Philox(key=[story.config.train.seed, 1])).permutation(len(pieces)):
        if wanted <= 0:
            break
        chosen.append(pieces[index])
        wanted -= float(pieces[index].weights.sum())
    return chosen


def say_shortfall(story: Story, rows: Sequence[Row], replayed: Sequence[Row]) -> None:
    """Say so where the text does not suffice for `train.replay_share` beside `rows`."""
    share, own, mixed_in = story.config.train.replay_share, *(sum(float(row.weights.sum()) for row in part) for part in (rows, replayed))
    if mixed_in < share / (1 - share) * own:
        reached = mixed_in / (own + mixed_in)
        story.notice(
            "train", f"the text for replay suffices for a share of {reached:.2f} instead of {share:g}; name more in train.replay_path"
        )


def cut(rows: Sequence[Row], max_tokens: int) -> list[Row]:
    """Pieces of at most `max_tokens`; each repeats the last token of the one before, so that every target stays one."""
    pieces = []
    for row in rows:
        for start in range(0, max(1, len(row) - 1), max(1, max_tokens - 1)):
            weights = np.array(row.weights[start : start + max_tokens])
            weights[0] = 0.0
            pieces.append(Row(row.input_ids[start : start + max_tokens], weights))
    return pieces
