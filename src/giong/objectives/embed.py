"""Texts as vectors: a text lies nearer to its positive than to others.

`in_batch`: InfoNCE (van den Oord et al. 2018, 1807.03748, equation 4) with the positives of the whole step as each other's negatives
(Karpukhin et al. 2020, 2004.04906, equation 2), over cosines divided by a temperature. `triplet`: the hinge of Schroff et al. 2015,
1503.03832, equation 3, on the text, its positive and its own negatives alone.

One decision a reader may question: with `in_batch` the loss of a row depends on the other rows of its step, so the step may not be cut
into several passes (`couples_rows`); all other objectives are sums over rows.

Axis letters: R rows of a pack, D width, G groups (a text, its positive, its negatives), M candidates (all rows but the texts).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch.nn.functional import normalize

from giong.contracts import LossSum

NEEDS = ("outputs_RC", "targets_RC")

ANCHOR, POSITIVE, NEGATIVE = 0.0, 1.0, 2.0
"""Roles of a row: first number of its target. The second numbers its text, so that a copy of the positive is not taken for a negative."""

Loss = Literal["in_batch", "triplet"]


def couples_rows(kind: Loss) -> bool:
    """Whether the rows of a step have to share one pass."""
    return kind == "in_batch"


def loss(tensors: Mapping[str, torch.Tensor], *, kind: Loss = "in_batch", temperature: float = 0.05, margin: float = 0.2) -> LossSum:
    """Sum over groups G, in nats (`in_batch`) or cosine (`triplet`). Each group's rows lie together, its text first.

    The metric `accuracy` counts texts that lie nearest to their own positive among all candidates compared.
    """
    states_RD, targets_RC = normalize(tensors["outputs_RC"], dim=1), tensors["targets_RC"].detach()
    role_R, text_R = targets_RC[:, 0], targets_RC[:, 1]
    group_R = (role_R == ANCHOR).cumsum(0) - 1
    anchors_GD, is_candidate_R = states_RD[role_R == ANCHOR], role_R != ANCHOR
    cosines_GM = anchors_GD @ states_RD[is_candidate_R].T
    role_M, text_M, group_M = role_R[is_candidate_R], text_R[is_candidate_R], group_R[is_candidate_R]
    groups_G = torch.arange(len(anchors_GD), device=group_M.device)
    is_own_GM = group_M[None] == groups_G[:, None]
    is_positive_GM = is_own_GM & (role_M == POSITIVE)[None]
    positive_G = cosines_GM[is_positive_GM]
    num_groups = cosines_GM.new_tensor(float(len(anchors_GD)))
    if kind == "triplet":
        is_negative_GM = is_own_GM & (role_M == NEGATIVE)[None]
        hinges_GM = (margin - positive_G[:, None] + cosines_GM).clamp_min(0.0) * is_negative_GM
        nearest_GM = cosines_GM.detach().masked_fill(~is_negative_GM, -torch.inf)
        losses_G = hinges_GM.sum(1) / is_negative_GM.sum(1)
    else:
        text_G = text_M[None].expand_as(is_positive_GM)[is_positive_GM]
        is_copy_GM = (text_M[None] == text_G[:, None]) & ~is_positive_GM
        logits_GM = (cosines_GM / temperature).masked_fill(is_copy_GM, -torch.inf)
        nearest_GM = cosines_GM.detach().masked_fill(is_copy_GM | is_positive_GM, -torch.inf)
        losses_G = logits_GM.logsumexp(1) - positive_G / temperature
    return LossSum(losses_G.sum(), num_groups, {"accuracy": (positive_G.detach() > nearest_GM.amax(1)).sum()})
