"""Packs: how token rows of unequal length become forward passes without padding.

A pack is several rows laid end to end; positions restart and attention stops at each row's border, so packing changes
speed and memory, never a number beyond rounding (with dropout other packs draw other masks). Rows of one group (the two answers of a pair) are planned as one and share a pack, because their
objective compares them. Axis letters used in the engine: T tokens of a pack, N positions with loss, R rows, D width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from giong.engine.shapes import rounded
from giong.models.rows import Row

MAX_BALANCED_PACKS = 32
"""More packs than that are nearly all full: there is little to level."""
BUDGET_GRAINS = 64
"""The smallest sufficient budget is looked for in steps of this part of the whole."""


@dataclass(frozen=True, slots=True)
class Pack:
    """Rows end to end. `loss_positions_N` are the positions whose next token (in rows with labels: whose own) carries loss; `targets_RC` are the targets of rows that
    are judged as a whole.

    `extras` are the rows' own, and with rows in groups `group_of_R`, which counts the groups of this pack from 0.
    """

    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    lengths: tuple[int, ...]
    loss_positions_N: torch.Tensor
    targets_N: torch.Tensor
    weights_N: torch.Tensor
    row_of_N: torch.Tensor
    targets_RC: torch.Tensor | None = None
    extras: dict[str, torch.Tensor] = field(default_factory=dict)


def pack(rows: Sequence[Row]) -> Pack:
    """Lay rows end to end."""
    input_ids = np.concatenate([row.input_ids for row in rows]).astype(np.int64)
    weights = np.concatenate([row.weights for row in rows]).astype(np.float32)
    lengths = tuple(len(row) for row in rows)
    positions = np.concatenate([np.arange(length) for length in lengths])
    labels = np.concatenate([row.input_ids if row.labels is None else row.labels for row in rows]).astype(np.int64)
    targets = np.flatnonzero(weights)
    row_of_token = np.repeat(np.arange(len(rows)), lengths)
    # A token is predicted from the position before it, a hidden one from its own.
    behind = np.repeat([row.labels is None for row in rows], lengths)[targets].astype(np.int64)
    row_targets = [row.target for row in rows if row.target is not None]
    return Pack(
        torch.from_numpy(input_ids),
        torch.from_numpy(positions),
        lengths,
        torch.from_numpy(targets - behind),
        torch.from_numpy(labels[targets]),
        torch.from_numpy(weights[targets]),
        torch.from_numpy(row_of_token[targets]),
        torch.from_numpy(np.stack(row_targets).astype(np.float32)) if row_targets else None,
        _extras(rows),
    )


def rounded_up(given: Pack) -> Pack:
    """The pack with a last row of filler that rounds its tokens: nothing asks for that row's states, and it sees no other."""
    num_tokens = len(given.input_ids_T)
    if not (filler := rounded(num_tokens) - num_tokens):
        return given
    ids, places = given.input_ids_T, given.position_ids_T
    return replace(
        given, input_ids_T=torch.cat([ids, ids.new_zeros(filler)]),
        position_ids_T=torch.cat([places, torch.arange(filler, device=places.device, dtype=places.dtype)]), lengths=(*given.lengths, filler),
    )  # fmt: skip


def _extras(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    laid: dict[str, torch.Tensor] = {}
    for name in rows[0].extras:
        values = [np.atleast_1d(np.asarray(row.extras[name], dtype=np.float32)) for row in rows]
        laid[name] = torch.from_numpy(np.concatenate(values))
    if rows[0].group is not None:
        groups = grouped(rows)
        laid["group_of_R"] = torch.from_numpy(np.repeat(np.arange(len(groups)), [len(group) for group in groups]))
    return laid


def grouped(rows: Sequence[Row]) -> list[list[int]]:
    """The indices of rows that are never parted: neighbours of one group; a row without a group stands alone."""
    groups: list[list[int]] = []
    for index, row in enumerate(rows):
        if index and row.group is not None and row.group == rows[index - 1].group:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def group_lengths(rows: Sequence[Row]) -> list[int]:
    """Tokens of each group of `grouped`."""
    return [sum(len(rows[index]) for index in group) for group in grouped(rows)]


def loss_weight(rows: Sequence[Row]) -> float:
    """What the loss of these rows is divided by: the number of their groups, and what rows without a group add."""
    alone = sum(row.loss_weight for row in rows if row.group is None)
    return alone + len({row.group for row in rows if row.group is not None})


def plan_packs(lengths: Sequence[int], max_tokens: int, lanes: int = 1) -> list[list[int]]:
    """Distribute rows over as few packs of at most `max_tokens` as first fit finds, of nearly equal size; a longer row stands alone.

    The largest pack decides how much memory a step takes, so a full one and a rest are made two halves. Of packs that are computed
    `lanes` at a time there may be more, up to a multiple of that number, where that makes the largest smaller. Returns indices into `lengths`; each pack's indices ascend, packs are
    ordered by their first row.
    """
    packs = _first_fit(lengths, max_tokens)
    fitting = [length for length in lengths if length <= max_tokens]
    num_alone = len(lengths) - len(fitting)
    wanted = -(-(len(packs) - num_alone) // lanes) * lanes
    if 1 < wanted <= MAX_BALANCED_PACKS:
        low, high = -(-sum(fitting) // wanted), max_tokens
        while high - low > max(1, max_tokens // BUDGET_GRAINS):
            middle = (low + high) // 2
            if len(tried := _first_fit(lengths, middle)) <= wanted + num_alone:
                packs, high = tried, middle
            else:
                low = middle
    return sorted(sorted(members) for members in packs)


def _first_fit(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Longest first, into the first pack with room. Rows of like length so come together, which attention likes."""
    packs: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for position, (used, members) in enumerate(packs):
            if used + lengths[index] <= max_tokens:
                members.append(index)
                packs[position] = (used + lengths[index], members)
                break
        else:
            packs.append((lengths[index], [index]))
    return [members for _, members in packs]


def plan_steps(num_rows: int, batch_rows: int, num_epochs: float, seed: int) -> list[np.ndarray]:
    """Which rows each optimizer step sees: a fresh shuffle per epoch, the last batch of an epoch may be smaller.

    Pure arithmetic on the seed, so a resumed run needs only the number of the step. A fractional last epoch is cut.
    """
    steps: list[np.ndarray] = []
    whole, fraction = divmod(num_epochs, 1.0)
    for epoch in range(int(whole) + (fraction > 0)):
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_rows)
        if epoch == int(whole):
            order = order[: max(1, round(num_rows * fraction))]
        steps.extend(order[start : start + batch_rows] for start in range(0, len(order), batch_rows))
    return steps
