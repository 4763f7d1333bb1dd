"""A key-value cache with room to grow: a new token is written into place, and not beside a copy of all the others.

transformers' dynamic cache concatenates, so each token written copies the whole cache; at 20 answers over 1,800 tokens of
few-shot prompt that copying costs more than the model.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from giong.models.soft_prompt import soft_prompt_of

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

    def keep(self, rows: torch.Tensor, first: int) -> None:
        """Keep these rows, and of each the tokens from number `first` on."""
        length = self.get_seq_length() - first
        self._rooms = tuple(self._room_like(old, len(rows), length) for old in (self.keys, self.values))
        for room, old in zip(self._rooms, (self.keys, self.values)):
            for place, row in enumerate(rows.tolist()):
                room[place, :, :length] = old[row, :, first:]
        self.keys, self.values = (room[:, :, :length] for room in self._rooms)

    def append(self, other: RoomyLayer) -> None:
        """Add the rows of another layer; whoever has fewer tokens is padded on the left, with zeros."""
        parts = (self.keys, self.values), (other.keys, other.values)
        length = max(keys.shape[-2] for keys, _ in parts)
        rooms = tuple(self._room_like(old, sum(keys.shape[0] for keys, _ in parts), length) for old in parts[0])
        start = 0
        for part in parts:
            end, padding = start + part[0].shape[0], length - part[0].shape[-2]
            for room, states in zip(rooms, part):
                # What is masked is multiplied by zero, which whatever lay in this memory might survive.
                room[start:end, :, :padding] = 0
                room[start:end, :, padding:length] = states
            start = end
        self._rooms = rooms
        self.keys, self.values = (room[:, :, :length] for room in rooms)

    @staticmethod
    def _room_like(old: torch.Tensor, num_rows: int, length: int) -> torch.Tensor:
        return old.new_empty(num_rows, old.shape[1], length + ROOM_TOKENS, old.shape[-1])

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


def soft_prompt_cache(model: PreTrainedModel) -> tuple[DynamicCache | None, int]:
    """The cache, of a single row, of the model's soft prompt, and how many tokens it holds; (None, 0) where there is none."""
    prompt = soft_prompt_of(model)
    if prompt is None:
        return None, 0
    cache = make_cache(model)
    if prompt.is_prefix:
        for layer, states in enumerate(prompt.keys_and_values()):
            cache.update(*states[:, None], layer)
    else:
        model(inputs_embeds=prompt.prompt_embeddings[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache, prompt.num_virtual_tokens


def can_grow(cache: DynamicCache) -> bool:
    """Whether rows can join: not where a layer keeps a window alone, whose tokens stand at no fixed place."""
    return all(isinstance(layer, RoomyLayer) for layer in cache.layers)


def keep_rows(cache: DynamicCache, rows: torch.Tensor, first: int) -> None:
    """Keep these rows of all layers, and the tokens from number `first` on (0 where the cache cannot grow)."""
    if can_grow(cache):
        for layer in cache.layers:
            layer.keep(rows, first)
    else:
        cache.batch_select_indices(rows)


def join_rows(cache: DynamicCache, other: DynamicCache) -> None:
    """Add the rows of `other`, both of which can grow, to `cache`."""
    for layer, newcomer in zip(cache.layers, other.layers):
        layer.append(newcomer)
