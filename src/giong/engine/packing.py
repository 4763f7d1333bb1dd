"""Packs: how token rows of unequal length become forward passes without padding.

A pack is several rows laid end to end; positions restart and attention stops at each row's border, so packing changes
speed and memory, never a number. Axis letters used in the engine: T tokens of a pack, N positions with loss,
D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from giong.models.rows import Row


@dataclass(frozen=True, slots=True)
class Pack:
    """Rows end to end. `loss_positions_N` are the positions whose next token carries loss; `targets_RC` are the targets of rows that
    are judged as a whole."""

    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    lengths: tuple[int, ...]
    loss_positions_N: torch.Tensor
    targets_N: torch.Tensor
    weights_N: torch.Tensor
    row_of_N: torch.Tensor
    targets_RC: torch.Tensor | None = None


def pack(rows: Sequence[Row]) -> Pack:
    """Lay rows end to end."""
    input_ids = np.concatenate([row.input_ids for row in rows]).astype(np.int64)
    weights = np.concatenate([row.weights for row in rows]).astype(np.float32)
    lengths = tuple(len(row) for row in rows)
    positions = np.concatenate([np.arange(length) for length in lengths])
    targets = np.flatnonzero(weights)
    row_of_token = np.repeat(np.arange(len(rows)), lengths)
    row_targets = [row.target for row in rows if row.target is not None]
    return Pack(
        torch.from_numpy(input_ids),
        torch.from_numpy(positions),
        lengths,
        torch.from_numpy(targets - 1),
        torch.from_numpy(input_ids[targets]),
        torch.from_numpy(weights[targets]),
        torch.from_numpy(row_of_token[targets]),
        torch.from_numpy(np.stack(row_targets).astype(np.float32)) if row_targets else None,
    )


def plan_packs(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Distribute rows over packs of at most `max_tokens` (first fit, longest first); a longer row stands alone.

    Returns indices into `lengths`; each pack's indices ascend, packs are ordered by their first row.
    """
    packs: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for position, (used, members) in enumerate(packs):
            if used + lengths[index] <= max_tokens:
                members.append(index)
                packs[position] = (used + lengths[index], members)
                break
        else:
            packs.append((lengths[index], [index]))
    return sorted(sorted(members) for _, members in packs)


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
