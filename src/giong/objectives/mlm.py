"""Masked language modelling, for encoders: some tokens are hidden, and each is predicted from both sides.

Devlin et al. 2018, 1810.04805, section 3.1: of the chosen tokens (15 %) eight in ten become [MASK], one in ten another token, one in ten
stays. The loss is the negative log-likelihood of what stood there.

One decision a reader may question: which tokens are hidden is drawn anew for every step, from the seed and the number of the step alone
(`masked`), so that a run that goes on after a kill hides the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from giong.models.rows import Row
from giong.objectives.sft import NEEDS, loss

__all__ = ["NEEDS", "loss", "masked"]

AS_MASK, AS_OTHER = 0.8, 0.1
"""Shares of the chosen tokens that become [MASK], and another token; the rest stays."""


def masked(rows: Sequence[Row], *, seed: int, step: int, mask_id: int, token_ids: np.ndarray, mask_share: float = 0.15) -> list[Row]:
    """The rows of a step with tokens hidden, and loss on these alone: at least one in each row.

    A row's `labels` are its tokens and its weights 1 where a token may be hidden; `token_ids` are those that may stand in for one.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    hidden = []
    for row in rows:
        assert row.labels is not None
        places = np.flatnonzero(row.weights)
        chosen = places[generator.random(len(places)) < mask_share]
        if not len(chosen):
            chosen = places[[generator.integers(len(places))]]
        draw = generator.random(len(chosen))
        input_ids, weights = row.labels.copy(), np.zeros_like(row.weights)
        input_ids[chosen[draw < AS_MASK]] = mask_id
        others = chosen[(draw >= AS_MASK) & (draw < AS_MASK + AS_OTHER)]
        input_ids[others] = token_ids[generator.integers(len(token_ids), size=len(others))]
        weights[chosen] = row.weights[chosen]
        hidden.append(replace(row, input_ids=input_ids, weights=weights))
    return hidden
