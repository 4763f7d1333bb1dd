"""Prefix tuning: only keys and values of some virtual tokens move, in every layer (Li and Liang 2021, 2101.00190, equation 3).

They start as the keys and values of real tokens (section 7.5: better than random numbers), so that with an initial text the tuned
model starts as the base behind that text. PEFT's file format.

One decision a reader may question: no reparametrisation by a perceptron (section 4.3, against unstable training from random numbers).
It multiplies what is trained a hundredfold, and the start at real keys and values is the other remedy of the same paper.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel

from giong.config import MethodConfig
from giong.methods.soft_prompt import apply_soft_prompt, checked_tokens
from giong.methods.trainable import Trainable

FORMAT = "adapter"


@torch.no_grad()
def apply(model: PreTrainedModel, config: MethodConfig, *, seed: int = 0, base_name: str = "") -> Trainable:
    """Put keys and values before every row in each layer of `model`. Raises ConfigError where text or model have no room for them."""
    tokens = checked_tokens(model, config, seed)
    training = model.training
    # Without the model's config no layer's window is shorter than the text.
    cache = DynamicCache()
    model.eval()(input_ids=tokens[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    model.train(training)
    states = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])
    return apply_soft_prompt(model, config, "PREFIX_TUNING", states.permute(3, 0, 1, 2, 4).flatten(1), base_name)
