"""Named diagnoses of a run that would go on in silence and teach nothing, found in its first steps.

Each is a pure function of rows, rates or tensors. A fatal one carries the error that stops the run; the others warn. The
names are stable: they stand in the events' `diagnosis`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from giong.engine.distributed import whole
from giong.engine.packing import Pack, pack
from giong.engine.step import forward_logprobs
from giong.errors import ConfigError, DataError, GiongError, TrainingError
from giong.models.rows import Row

FIRST_STEPS = 20
STILL_STEPS = 3
"""Steps after which a run that has not moved at all is stopped: an online objective may have one or two without a gradient."""
LABEL_CHECK_TOKENS = 256
MIN_POSITIONS = 16
SHIFT_NATS, SHIFT_DEVIATIONS = 0.5, 4.0
"""Shifted targets must be better by this much on average, and by so many standard errors: chance would need 30,000 runs."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What is wrong in one sentence, and what to do. `error` is the class that stops the run; None only warns."""

    name: str
    message: str
    remedy: str
    error: type[GiongError] | None = None


def diagnose_rows(rows: Sequence[Row], end_of_turn_ids: Sequence[int] = ()) -> Iterator[Diagnosis]:
    """Loss on zero tokens; an end-of-turn token that is not in the loss (`end_of_turn_ids` empty: raw text, nothing to check).

    Rows that are judged as a whole have no such tokens, and nothing is found. Rows with loss from their second token on, beside others
    that have a request in front, are running text (`train.replay_share`): they end no turn.
    """
    if rows and all(row.target is not None for row in rows):
        return
    last_targets = {index: _last_target(row) for index, row in enumerate(rows) if row.weights.any()}
    silent = [index for index in range(len(rows)) if index not in last_targets]
    if not last_targets:
        yield Diagnosis("no_loss_tokens", "No token of the training rows carries loss", "Check the data and `max_seq_length`.", DataError)
        return
    if silent:
        yield Diagnosis(
            "rows_without_loss", f"{len(silent)} of {len(rows)} rows have no token that carries loss and are left out, first: {_call(rows, silent[0])}",
            "Look at these rows: an empty answer, or one that was cut off.",
        )  # fmt: skip
    turns = {index: token for index, token in last_targets.items() if not rows[index].weights[1:].all()} or last_targets
    endless = [index for index, token in turns.items() if end_of_turn_ids and token not in end_of_turn_ids]
    if endless:
        every = len(endless) == len(turns)
        yield Diagnosis(
            "end_of_turn_not_in_loss",
            f"The end-of-turn token is not in the loss of {'any row' if every else f'{len(endless)} of {len(turns)} rows'}, first: {_call(rows, endless[0])}",
            "The model would not learn to stop: check the chat template (`model.chat_template`).", DataError if every else None,
        )  # fmt: skip


def _last_target(row: Row) -> int:
    return int(row.input_ids[np.flatnonzero(row.weights)[-1]])


def _call(rows: Sequence[Row], index: int) -> str:
    return rows[index].name or f"row {index}"


def diagnose_rates(learning_rates: Sequence[float]) -> Iterator[Diagnosis]:
    """A learning rate that is zero in every step."""
    if learning_rates and not any(learning_rates):
        yield Diagnosis("learning_rate_zero", "The learning rate is zero in every step", "Raise train.learning_rate.", ConfigError)


@torch.no_grad()
def diagnose_labels(model: PreTrainedModel, rows: Sequence[Row]) -> Iterator[Diagnosis]:
    """Whether the untouched model predicts the targets' neighbours better than the targets, on a pack of some of these rows."""
    chosen, num_tokens = [], 0
    # Hidden tokens are predicted in their own places: nothing there can be shifted.
    for row in sorted((row for row in rows if row.weights.any() and row.labels is None), key=len):
        if chosen and num_tokens + len(row) > LABEL_CHECK_TOKENS:
            break
        chosen.append(row)
        num_tokens += len(row)
    if not chosen:
        return
    training = model.training
    model.eval()
    try:
        yield from diagnose_pack(model, pack(chosen))
    finally:
        model.train(training)


@torch.no_grad()
def diagnose_pack(model: PreTrainedModel, given: Pack) -> Iterator[Diagnosis]:
    """Targets shifted by one: the same positions with the previous or the next target of their row in the given one's place.

    A neighbour that equals the token standing at the position does not count: many a model likes to repeat its input.
    """

    def logprobs_of(targets_N: torch.Tensor) -> torch.Tensor:
        return forward_logprobs(model, dataclasses.replace(given, targets_N=targets_N))["logprobs_N"].float().cpu()

    logprobs_N = logprobs_of(given.targets_N)
    standing_N = given.input_ids_T[given.loss_positions_N]
    follows_N = (given.row_of_N.diff() == 0) & (given.loss_positions_N.diff() == 1)
    edge = follows_N.new_zeros(1)
    for by, has_neighbour_N in ((1, torch.cat([edge, follows_N])), (-1, torch.cat([follows_N, edge]))):
        shifted_N = given.targets_N.roll(by)
        counts_N = has_neighbour_N & (shifted_N != standing_N) & (shifted_N != given.targets_N)
        gains = (logprobs_of(shifted_N) - logprobs_N)[counts_N.cpu()]
        if is_better(gains):
            yield Diagnosis(
                "labels_shifted",
                f"The labels look shifted by one: the {'previous' if by == 1 else 'next'} token fits {float(gains.mean()):.2g} nats better than the target",
                "Predict each token from those before it, once: shift either the targets or the positions, not both or neither.", DataError,
            )  # fmt: skip


def is_better(gains: torch.Tensor) -> bool:
    """Whether paired differences (nats) are well above zero and not by chance."""
    if len(gains) < MIN_POSITIONS:
        return False
    mean, error = float(gains.mean()), float(gains.std()) / math.sqrt(len(gains))
    return mean > max(SHIFT_NATS, SHIFT_DEVIATIONS * error)


class FirstSteps:
    """Watches the optimizer's state over a run's first steps: does anything move, is everything reached?

    The state is that of `MasterOptimizer.state_tensors`: `master/NAME`, and the moments as PART/KIND/NAME. `first` is the
    step (from 0) that this process begins with.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], first: int) -> None:
        self.first = self.num_done = first
        self._before = [] if self.is_over else _fingerprint(tensors)
        self._moved = False

    @property
    def is_over(self) -> bool:
        return self.num_done >= FIRST_STEPS

    def after_step(self, tensors: Mapping[str, torch.Tensor], grad_norm: float, *, is_last: bool) -> Iterator[Diagnosis]:
        """The diagnoses that this step completes."""
        self.num_done += 1
        num_seen = self.num_done - self.first
        # Weight decay alone moves weights too, but it learns nothing.
        self._moved = self._moved or (grad_norm > 0 and _fingerprint(tensors) != self._before)
        if not self._moved and (num_seen == STILL_STEPS or (is_last and not self.first)):
            yield Diagnosis(
                "nothing_moves", f"No trainable weight has changed in {num_seen} steps (gradient norm {grad_norm:.3g})",
                "Raise train.learning_rate." if grad_norm > 0 else "No gradient arrives: check method.target_modules and the objective.",
                TrainingError,
            )  # fmt: skip
        elif self.num_done == FIRST_STEPS or (is_last and num_seen >= STILL_STEPS):
            yield from diagnose_reach(tensors)


def _fingerprint(tensors: Mapping[str, torch.Tensor]) -> list[tuple[float, float]]:
    masters = [tensor for name, tensor in tensors.items() if name.startswith("master/")]
    return [(float(whole(tensor.sum(dtype=torch.float64))), float(whole(tensor.norm()))) for tensor in masters]


def diagnose_reach(tensors: Mapping[str, torch.Tensor]) -> Iterator[Diagnosis]:
    """Trainable weights whose moments are still all zero: no gradient has ever arrived there."""
    names = [key.removeprefix("master/") for key in tensors if key.startswith("master/")]
    parts = (key.split("/", 2) for key in tensors if not key.startswith("master/"))
    reached = {name for part, kind, name in parts if kind != "step" and bool(whole(tensors[f"{part}/{kind}/{name}"].any()))}
    if unreached := [name for name in names if name not in reached]:
        yield Diagnosis(
            "adapter_never_reached", f"{len(unreached)} of {len(names)} trainable tensors never got a gradient, first: {unreached[0]}",
            "The model does not call that layer in training: take it out of method.target_modules.",
        )  # fmt: skip
