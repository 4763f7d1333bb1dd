"""What the steps of a run go through: the tokens that are trained on, scored and drawn, and the largest pack among them.

One decision a reader may question: a drawn answer is taken to be as long as the author's own to the same request, or as its limit where
that is shorter. How long a model's answers are shows when it writes them, and one that was made by `sft` ends about where the author does.
Memory has to suffice for answers that go on to the limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from giong.config import MethodConfig, ObjectiveConfig, TrainConfig
from giong.config.training import ONLINE
from giong.contracts import ModelShape
from giong.engine.distributed import ALONE
from giong.engine.lanes import may_share
from giong.engine.memory import largest_pack
from giong.engine.packing import group_lengths, grouped, plan_steps
from giong.engine.shapes import rounded
from giong.methods.sparse import parts_of
from giong.models.rows import Row
from giong.sizing.defaults import ResolvedTraining
from giong.sizing.lanes import num_lanes
from giong.sizing.moving import SOFT_PROMPTS
from giong.sizing.shapes import linear_layers, num_trainable_parameters
from giong.workflow.drawing import answer_limit, num_scorings
from giong.workflow.preferring import needs_reference
from giong.workflow.story import Lengths, Story

SAMPLED_STEPS = 64
"""Steps whose packs are planned to see how they differ in length: later ones bring hardly another."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Of a whole run, every epoch and update counted. `num_tokens` in `num_rows` rows go forward and backward, `num_loss_tokens` of them
    with loss; `num_scored_tokens` go forward alone, and `num_written_tokens` are drawn."""

    num_tokens: int
    num_loss_tokens: int
    num_rows: int
    num_steps: int
    num_scored_tokens: int
    num_written_tokens: int


def workload_of(story: Story, rows: Sequence[Row], train: TrainConfig) -> Workload:
    """What a run on `rows`, the author's and those that are mixed in, goes through. The scoring of held-out pairs is not counted."""
    objective, num_epochs = story.config.objective.resolved(), train.num_epochs or 1.0
    rows = [row for row in rows if row.loss_weight]
    num_tokens, num_loss_tokens = sum(map(len, rows)), sum(int(np.count_nonzero(row.weights)) for row in rows)
    num_steps = math.ceil(len(grouped(rows)) * num_epochs / train.batch_rows)
    # How often a row is learnt as it is, and its request answered.
    own, drawn = num_epochs * (1.0 - share_drawn(objective)), num_epochs * share_drawn(objective) * answers_per_request(objective)
    lengths = drawn_lengths(story, rows) if drawn else []
    written, asked = sum(answer for _, answer in lengths), sum(map(sum, lengths))
    updates = objective.num_updates or 1
    learnt = drawn * updates
    return Workload(
        num_tokens=round(own * num_tokens + learnt * asked), num_loss_tokens=round(own * num_loss_tokens + learnt * written),
        num_rows=round(own * len(rows) + learnt * len(lengths)), num_steps=num_steps * updates,
        num_scored_tokens=round(num_scorings(objective) * drawn * asked) + (num_tokens if needs_reference(objective) else 0),
        num_written_tokens=round(drawn * written),
    )  # fmt: skip


def choosing_tokens(rows: Sequence[Row], method: MethodConfig, shape: ModelShape) -> int:
    """What goes forward and backward before the first step, by which `sparse` chooses its weights."""
    if method.name != "sparse" or method.sparse_score not in ("fisher", "gradient"):
        return 0
    lengths = group_lengths([row for row in rows if row.loss_weight])
    sizes = [linear.num_weights for linear in linear_layers(shape)] * shape.num_hidden_layers
    return round(min(method.sparse_rows, len(lengths)) * float(np.mean(lengths)) * len(parts_of(sizes))) if lengths else 0


def share_drawn(objective: ObjectiveConfig) -> float:
    """The share of the steps that learn from answers which the model draws."""
    return 1.0 if objective.name in ONLINE else objective.on_policy_share if objective.is_online else 0.0


def answers_per_request(objective: ObjectiveConfig) -> int:
    """How many answers are drawn to a request, and learnt in a step for each of its rows."""
    return objective.num_generations if objective.name in ONLINE else 1


def drawn_lengths(story: Story, rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Tokens of the request and of the answer that is expected to it, for each row whose request is asked."""
    limit = answer_limit(story)
    return [(prompt, min(len(row) - prompt, limit)) for row, prompt in _asked(story, rows)]


def _asked(story: Story, rows: Sequence[Row]) -> list[tuple[Row, int]]:
    names = {example.id for example in story.examples_of("train")}
    return [(row, int(np.flatnonzero(row.weights)[0])) for row in rows if row.name in names and row.loss_weight]


def largest_pack_of(story: Story, rows: Sequence[Row], resolved: ResolvedTraining, *, couples_rows: bool) -> list[Row]:
    """The largest pack that a step of the run can make, with answers drawn to their limit where the model draws them.

    `couples_rows` says that the loss of a row depends on the others of its step, which then are one pack whatever its bound.
    """
    objective, train, method = story.config.objective, resolved.train, resolved.method
    if share_drawn(objective):
        rows = _drawn_to_the_limit(story, rows) * answers_per_request(objective) + (list(rows) if share_drawn(objective) < 1 else [])
    return largest_pack(
        rows, None if couples_rows else train.max_tokens_per_pack, train.batch_rows * answers_per_request(objective),
        method.num_virtual_tokens if method.name in SOFT_PROMPTS else 0,
    )  # fmt: skip


def lengths_of(rows: Sequence[Row], train: TrainConfig, lanes: int = 1) -> Lengths:
    """Those of a run on `rows`, of packs as far as its first steps show; drawn answers are taken for the author's."""
    passes = (ALONE.passes(step, train.max_tokens_per_pack // lanes, lanes) for step in _first_steps(rows, train, SAMPLED_STEPS))
    packs = frozenset(rounded(sum(map(len, pack))) for plan in passes for pack, _ in plan)
    return Lengths(packs, frozenset(rounded(len(row)) for row in rows))


def lanes_of(story: Story, rows: Sequence[Row], resolved: ResolvedTraining) -> int:
    """How many passes a run on `rows` will compute at a time, as far as its first step and the base tell (`engine.lanes`)."""
    train, loaded, objective = resolved.train, story.local.loaded, story.config.objective
    # Of drawn answers the lengths are not known.
    has_other_passes = train.kl_weight > 0 or objective.couples_rows or objective.is_online or objective.name == "distill"
    # Single weights have the gradients of their whole matrices.
    if has_other_passes or resolved.method.name == "sparse" or train.compile is True or (story.processes or ALONE).size > 1:
        return 1
    first = next(_first_steps([row for row in rows if row.loss_weight], train, 1), [])
    lanes = num_lanes(
        group_lengths(first), train.max_tokens_per_pack, width=loaded.shape.hidden_size, num_threads=torch.get_num_threads(),
        moving_share=num_trainable_parameters(loaded.shape, resolved.method) / loaded.shape.num_parameters,
    )  # fmt: skip
    return lanes if lanes > 1 and may_share(loaded.model, training=True) else 1


def _first_steps(rows: Sequence[Row], train: TrainConfig, num: int) -> Iterator[list[Row]]:
    groups = [[rows[index] for index in group] for group in grouped(rows)]
    for step in plan_steps(len(groups), train.batch_rows, train.num_epochs or 1.0, train.seed)[:num]:
        yield [row for index in step for row in groups[index]]


def _drawn_to_the_limit(story: Story, rows: Sequence[Row]) -> list[Row]:
    """As long as drawing can make them; only their lengths are meant, and they take no memory."""
    limit, context, asked = answer_limit(story), story.local.loaded.max_seq_length, _asked(story, rows)
    ahead = max((prompt for _, prompt in asked), default=0)
    weights = np.concatenate([np.zeros(ahead, np.float32), np.ones(limit, np.float32)])
    drawn = []
    for row, prompt in asked:
        length = min(prompt + limit, context)
        # What is drawn comes with extras, so a trained head does not know the weights of its log-probabilities beforehand.
        extras = {"advantages_R": 0.0}
        drawn.append(Row(np.broadcast_to(row.input_ids[:1], length), weights[ahead - prompt :][:length], row.name, extras=extras))
    return drawn


def num_anchors(objective: ObjectiveConfig, train: TrainConfig) -> int:
    """How many copies of what moves a run keeps as it was at its start: one to be held near, one that scores drawn answers."""
    return bool(train.kl_weight or train.l2_to_base) + (objective.name in ONLINE)
