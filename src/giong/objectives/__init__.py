"""What moves the numbers: one file per objective, one explicit table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from giong.config import ObjectiveConfig
from giong.config.training import OF_OBJECTIVE
from giong.contracts import LossSum
from giong.objectives import classify, distill, dpo, embed, grpo, kto, mlm, orpo, ppo, pretrain, reward, rloo, sft, simpo

OBJECTIVES = {
    "sft": sft, "pretrain": pretrain, "dpo": dpo, "orpo": orpo, "simpo": simpo, "kto": kto, "reward": reward, "grpo": grpo, "rloo": rloo, "ppo": ppo,
    "distill": distill, "classify": classify, "embed": embed, "mlm": mlm,
}  # fmt: skip


def objective_of(config: ObjectiveConfig) -> Callable[[Mapping[str, torch.Tensor]], LossSum]:
    """The loss with the settings that are its own, as the engine calls it."""
    loss = OBJECTIVES[config.name].loss
    return partial(loss, config=config.resolved()) if config.name in OF_OBJECTIVE else loss
