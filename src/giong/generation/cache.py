"""A key-value cache with room to grow: a new token is written into place, and not beside a copy of all the others.

transformers' dynamic cache concatenates, so each token written copies the whole cache; at 20 answers over 1,800 tokens of
few-shot prompt that copying costs more than the model.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

ROOM_TOKENS = 128
"""Tokens of free room made at a time."""


class RoomyLayer(DynamicLayer):
    """Keys and values (rows, heads, tokens, head_dim) as views into larger tensors."""

    _rooms: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new states; returns all states so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        needed = length + key_states.shape[-2]
        if self._rooms is None or needed > self._rooms[0].shape[-2] or not self._is_in_room():
            self._rooms = tuple(self._make_room(old, new, needed) for old, new in ((self.keys, key_states), (self.values, value_states)))
        for room, new in zip(self._rooms, (key_states, value_states)):
            room[..., length:needed, :] = new
        self.keys, self.values = (room[..., :needed, :] for room in self._rooms)
        return self.keys, self.values

    def _is_in_room(self) -> bool:
        # Selecting or repeating rows replaces `keys` by a tensor of its own.
        assert self._rooms is not None
        return self.keys.data_ptr() == self._rooms[0].data_ptr() and self.keys.shape[0] == self._rooms[0].shape[0]

    @staticmethod
    def _make_room(old: torch.Tensor, new: torch.Tensor, needed: int) -> torch.Tensor:
        room = new.new_empty(*new.shape[:-2], needed + ROOM_TOKENS, new.shape[-1])
        if old.numel():
            room[..., : old.shape[-2], :] = old
        return room


def make_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache for `model`; layers with a sliding window keep transformers' own."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
