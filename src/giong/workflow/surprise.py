"""Answer tokens weighed by what the untuned base would not have said.

Likelihood is earned with the words that come often, and a small model that writes its most probable words writes bland ones. Weights
that grow with rarity lean it the other way (frequency-aware cross-entropy: Jiang et al. 2019, 1902.09191). One decision a reader may
question: rarity is the surprise of the base at the answer *alone*. Beside its request a name that is copied from there surprises nobody,
and it is among the words that shall not be lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from giong.engine.step import evaluate_rows
from giong.models.load import LoadedModel
from giong.models.rows import Row

MAX_SURPRISE = 8.0
"""Nats from which on rarity counts no further: a name in odd spelling is not worth a sentence."""


def weighed_by_surprise(loaded: LoadedModel, rows: Sequence[Row], share: float, max_tokens: int) -> list[Row]:
    """The rows with the weight of every answer token times 1 - share + share x surprise / mean surprise, in nats, so that the mean of
    the factors is 1. The first token of an answer, which nothing stands before, and end-of-turn tokens keep theirs.

    `loaded` is the model untuned; its forward passes take at most `max_tokens`.
    """
    places = [np.flatnonzero(row.weights) for row in rows]
    alone = [Row(row.input_ids[at], np.arange(len(at)).clip(max=1).astype(np.float32), row.name) for row, at in zip(rows, places)]
    scored = iter(evaluate_rows(loaded.model, [row for row in alone if len(row) > 1], max_tokens))
    surprises = [np.minimum(-next(scored).float().numpy(), MAX_SURPRISE) if len(row) > 1 else np.zeros(0) for row in alone]
    counted = [~np.isin(row.input_ids[1:], loaded.chat.end_token_ids) for row in alone]
    every = np.concatenate([surprise[which] for surprise, which in zip(surprises, counted)])
    mean = float(every.mean()) if len(every) else 1.0
    weighed = []
    for row, at, surprise, which in zip(rows, places, surprises, counted):
        weights = row.weights.copy()
        weights[at[1:][which]] *= (1 - share + share * surprise[which] / mean).astype(weights.dtype)
        weighed.append(replace(row, weights=weights))
    return weighed
