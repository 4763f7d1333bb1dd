"""Attention of packed rows through transformers' attention interface: each row sees itself only.

Rows of one pack are separated by slicing, not by a mask: a mask of T x T would cost memory and time for pairs that are
never used. The implementation is switched on for the engine's own forward passes only; decoding keeps the model's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from giong.errors import ModelError

IMPLEMENTATION = "giong_packed"


def packed_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    lengths: tuple[int, ...],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """query (1, heads, T, head_dim), key and value (1, key-value heads, T, head_dim) -> (1, T, heads, head_dim).

    `lengths` are the rows of the pack. A window or soft cap falls back to an explicit mask or formula per row.
    """
    if key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if len(set(lengths)) == 1:
        # Equal rows become a batch: one kernel call instead of one per row.
        split = [tensor.unflatten(2, (len(lengths), lengths[0]))[0].transpose(0, 1) for tensor in (query, key, value)]
        output = _attend(*split, scaling, dropout, sliding_window, softcap)
        return output.transpose(1, 2).flatten(0, 1).unsqueeze(0), None
    rows = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)))
    outputs = [_attend(q, k, v, scaling, dropout, sliding_window, softcap) for q, k, v in rows]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    length = query.shape[2]
    windowed = sliding_window is not None and sliding_window < length
    if not windowed and softcap is None:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, dropout_p=dropout)
    seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    if windowed:
        seen = seen.triu(1 - sliding_window)
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling, dropout_p=dropout)
    scores = query @ key.transpose(-1, -2) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores.float() / softcap)
    shares = scores.masked_fill(~seen, float("-inf")).softmax(-1).to(value.dtype)
    return torch.nn.functional.dropout(shares, dropout) @ value


AttentionInterface.register(IMPLEMENTATION, packed_attention_forward)


@contextlib.contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within this block the model's forward expects `lengths=` and keeps packed rows apart.

    Raises ModelError for a family whose layers mix tokens by other means, because its rows would see each other.
    """
    config = model.config
    if not model._supports_attention_backend or model._is_stateful:
        raise ModelError(
            f"The {config.model_type} family cannot keep packed rows apart", place=config.model_type,
            remedy="Use a family whose attention goes through transformers' attention interface (Llama, Qwen, Gemma, Mistral, GPT-2, ...).",
        )  # fmt: skip
    before = config._attn_implementation
    config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation = before
