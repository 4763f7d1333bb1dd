"""A value for every token of a drawn answer: what reward is still to come, read off the hidden state that the token is drawn from.

One decision a reader may question: the hidden states are detached, so a value never moves the model, whatever method trains it. It
learns what the states already tell; a network of its own, as large as the model, would learn more and cost as much again.
"""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedModel

from giong.engine.packing import Pack
from giong.engine.step import forward_logprobs

NAMES = ("value_head.weight", "value_head.bias")


class ValueHead:
    """A linear layer on hidden states that are normalised to length 1: its gradient then is no larger than its error, and clipping the
    gradient of all that moves leaves the policy its part."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.weight_D = torch.nn.Parameter(torch.zeros(width, device=device))
        self.bias = torch.nn.Parameter(torch.zeros((), device=device))

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return dict(zip(NAMES, (self.weight_D, self.bias)))

    @torch.no_grad()
    def start_at(self, value: float) -> None:
        """Expect `value` everywhere. From 0 the weights would climb to the mean reward as well, and no two states climb alike: for as long
        as that takes, values differ by more than returns do."""
        self.bias.fill_(value)

    def forward(self, model: PreTrainedModel, pack: Pack) -> dict[str, torch.Tensor]:
        """As `forward_logprobs`, with `values_N` (fp32), which have no gradient in the model."""
        tensors = forward_logprobs(model, pack)
        hidden_ND = torch.nn.functional.layer_norm(tensors["hidden_ND"].detach().float(), self.weight_D.shape)
        tensors["values_N"] = hidden_ND @ self.weight_D / math.sqrt(len(self.weight_D)) + self.bias
        return tensors
