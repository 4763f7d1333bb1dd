"""When a run has learned enough: the likelihood of held-out rows no longer rises, or the trained rows are known by heart.

Both signals are needed: verbatim memorisation rises before the held-out likelihood is at its best (Slack and Al Moubayed 2025,
2510.11372).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from giong.engine.step import evaluate_rows
from giong.models.rows import Row

RUN_TOKENS = 8
SURE = math.log(0.5)
"""A token with more than half of the probability is the one that greedy decoding writes, whatever the others have."""


@dataclass(frozen=True, slots=True)
class EarlyStopping:
    """The evaluations so far. `reason` is empty until one of the two limits is passed, or the loop has another one; None is no limit."""

    patience: int | None = None
    max_memorisation: float | None = None
    best_loss: float | None = None
    num_without_gain: int = 0
    reason: str = ""

    @property
    def is_on(self) -> bool:
        return self.patience is not None or self.max_memorisation is not None or bool(self.reason)

    def after(self, validation_loss: float, memorisation: float | None = None) -> EarlyStopping:
        """What it is after one more evaluation; a reason to stop stays. A loss that is no number is not a gain."""
        gained = math.isfinite(validation_loss) and (self.best_loss is None or validation_loss < self.best_loss)
        best, num_without_gain = (validation_loss, 0) if gained else (self.best_loss, self.num_without_gain + 1)
        reason = ""
        if self.max_memorisation is not None and memorisation is not None and memorisation > self.max_memorisation:
            reason = f"{memorisation:.1%} more of the trained rows than of the held-out ones is known by heart (limit {self.max_memorisation:.1%})"
        elif self.patience is not None and num_without_gain >= self.patience:
            reason = f"the validation loss has not fallen below {'a number' if best is None else f'{best:.4f}'} in {num_without_gain} evaluations"
        return replace(self, best_loss=best, num_without_gain=num_without_gain, reason=self.reason or reason)


def recalled_share(logprobs_per_row: Sequence[torch.Tensor]) -> float:
    """Share of all runs of 8 answer tokens that the model would write by itself after what stands before: each token is sure.

    A row of fewer than 8 tokens has no such run; 0 where no row has one.
    """
    sure_runs, num_runs = 0, 0
    for logprobs in logprobs_per_row:
        if len(logprobs) >= RUN_TOKENS:
            runs = (logprobs > SURE).unfold(0, RUN_TOKENS, 1).all(1)
            sure_runs, num_runs = sure_runs + int(runs.sum()), num_runs + len(runs)
    return sure_runs / num_runs if num_runs else 0.0


def memorisation_score(model: PreTrainedModel, trained: Sequence[Row], held_out: Sequence[Row], max_tokens: int) -> float:
    """How much more of the trained rows is recalled than of rows that were never seen: what is easy for anybody cancels out.

    As many trained rows are asked as there are held-out ones, evenly spread.
    """
    chosen = [trained[index * len(trained) // len(held_out)] for index in range(min(len(held_out), len(trained)))]
    return recalled_share(evaluate_rows(model, chosen, max_tokens)) - recalled_share(evaluate_rows(model, held_out, max_tokens))
