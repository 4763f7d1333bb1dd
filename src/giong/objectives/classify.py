"""Classification and regression on a whole text: softmax cross-entropy, one sigmoid per label, or squared error.

Single label: Bridle 1990 (softmax), with label smoothing as in Szegedy et al. 2015, 1512.00567, section 7: the target is
(1 - e) y + e / C. Multi label: the sum over labels of the binary cross-entropy, divided by their number. Regression: (output - target)^2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax

from giong.contracts import LossSum

NEEDS = ("outputs_RC", "targets_RC")

Problem = Literal["single_label", "multi_label", "regression"]


def loss(tensors: Mapping[str, torch.Tensor], *, problem: Problem = "single_label", label_smoothing: float = 0.0) -> LossSum:
    """Sum over rows R; `targets_RC` holds 1 for a row's labels and 0 for others, or the value (C = 1). Nats, or squared units.

    The metric `accuracy` counts rows whose likeliest label, or whose every label at a half, is right; a regression has none.
    """
    outputs_RC, targets_RC = tensors["outputs_RC"], tensors["targets_RC"].detach()
    num_rows = outputs_RC.new_tensor(float(len(outputs_RC)))
    if problem == "regression":
        return LossSum((outputs_RC - targets_RC).square().sum(), num_rows)
    if problem == "multi_label":
        losses_RC = binary_cross_entropy_with_logits(outputs_RC, targets_RC, reduction="none")
        right_R = ((outputs_RC.detach() > 0) == (targets_RC > 0.5)).all(1)
        return LossSum(losses_RC.mean(1).sum(), num_rows, {"accuracy": right_R.sum()})
    smooth_RC = (1 - label_smoothing) * targets_RC + label_smoothing / targets_RC.shape[1]
    right_R = outputs_RC.detach().argmax(1) == targets_RC.argmax(1)
    return LossSum(-(smooth_RC * log_softmax(outputs_RC, 1)).sum(), num_rows, {"accuracy": right_R.sum()})
