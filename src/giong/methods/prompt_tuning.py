"""Prompt tuning: only the embeddings of some virtual tokens before every row move (Lester et al. 2021, 2104.08691, section 2).

With an initial text the tuned model starts as the base behind that text. PEFT's file format.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from giong.config import MethodConfig
from giong.methods.soft_prompt import apply_soft_prompt, checked_tokens
from giong.methods.trainable import Trainable

FORMAT = "adapter"


@torch.no_grad()
def apply(model: PreTrainedModel, config: MethodConfig, *, seed: int = 0, base_name: str = "") -> Trainable:
    """Put virtual tokens before every row of `model`. Raises ConfigError where text or model have no room for them."""
    start = model.get_input_embeddings()(checked_tokens(model, config, seed))
    return apply_soft_prompt(model, config, "PROMPT_TUNING", start, base_name)
