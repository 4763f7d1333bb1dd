"""A soft prompt before each row of a pack: the rows become longer by its tokens, whose hidden states nobody asks for.

One decision a reader may question: a prefix (keys and values of every layer) is computed as if its tokens were in the row, with
attention's keys and values put in the place of theirs. That costs a pass over V tokens per row, which prompt tuning costs too, and
every attention kernel, window and soft cap works as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from giong.engine.packing import Pack
from giong.models.soft_prompt import SoftPrompt


@dataclass(frozen=True, slots=True)
class PrefixStates:
    """`states` (layers, 2, key-value heads, V, head_dim), put at the places `virtual` of each layer's keys and values."""

    states: torch.Tensor
    virtual: torch.Tensor
    num_rows: int

    def put(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (1, key-value heads, T, head_dim) of a layer with the prefix before each row."""
        states = self.states[layer].to(key.dtype).repeat(1, 1, self.num_rows, 1).unsqueeze(1)
        return key.index_copy(2, self.virtual, states[0]), value.index_copy(2, self.virtual, states[1])


def behind_soft_prompt(model: PreTrainedModel, prompt: SoftPrompt, pack: Pack) -> tuple[dict[str, Any], torch.Tensor]:
    """What the decoder is called with, and the places (T) of the pack's own tokens in what it returns."""
    device, count, num_rows = pack.input_ids_T.device, prompt.num_virtual_tokens, len(pack.lengths)
    lengths = tuple(count + length for length in pack.lengths)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    own, virtual = (positions >= count).nonzero()[:, 0], (positions < count).nonzero()[:, 0]
    embedded_TD = model.get_input_embeddings()(pack.input_ids_T)
    inputs_TD = embedded_TD.new_zeros(len(positions), embedded_TD.shape[1]).index_copy(0, own, embedded_TD)
    inputs: dict[str, Any] = {"position_ids": positions[None], "lengths": lengths}
    if prompt.is_prefix:
        inputs["prefix"] = PrefixStates(prompt.keys_and_values(), virtual, num_rows)
    else:
        inputs_TD = inputs_TD.index_copy(0, virtual, prompt.prompt_embeddings.to(inputs_TD.dtype).repeat(num_rows, 1))
    return {**inputs, "inputs_embeds": inputs_TD[None]}, own
