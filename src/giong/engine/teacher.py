"""A second, frozen model that reads the same packs: what distillation learns from.

One decision a reader may question: the teacher reads every pack anew instead of once before the run. Its distributions over a whole
vocabulary would fill a disk (128 KiB per token at 65,000 entries in bf16), and those of drawn answers cannot be known before.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from giong.engine.cross_entropy import Head
from giong.engine.divergence import token_kl
from giong.engine.packing import Pack
from giong.engine.step import before_head, forward_logprobs, hidden_states, output_head


class Teacher:
    """`model` must know the student's tokens by the same numbers, and stand on the same device."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def forward(self, model: PreTrainedModel, pack: Pack) -> dict[str, torch.Tensor]:
        """As `forward_logprobs`, with `teacher_kl_N`: KL(teacher || model) of the next token at each position with loss."""
        with torch.no_grad():
            states_ND = hidden_states(self.model, pack).index_select(0, pack.loss_positions_N.to(self.model.device))
            teacher_ND = before_head(self.model, states_ND)
        tensors = forward_logprobs(model, pack)
        head, teacher_head = output_head(model), output_head(self.model)
        # Models of one family pad their vocabulary to different lengths: what no token stands for has no share.
        size = min(len(head.weight_VD), len(teacher_head.weight_VD))
        tensors["teacher_kl_N"] = token_kl(tensors["hidden_ND"], _first(head, size), teacher_ND, _first(teacher_head, size))
        return tensors


def _first(head: Head, size: int) -> Head:
    return replace(head, weight_VD=head.weight_VD[:size], bias_V=None if head.bias_V is None else head.bias_V[:size])
