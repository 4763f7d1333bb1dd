"""Causal attention of packed rows on the CPU: PyTorch's fused kernel forwards, row by row, and a backward pass of our own.

One decision a reader may question: the fused kernel's own backward pass is left alone. On rows of up to about a thousand tokens it
takes several times the matrix products it stands for (benchmarks/roofline.py shows the share), so here the scores are formed again
block by block: at most 256 queries of a long row, a few megabytes of many short ones. They are rounded to the compute dtype
before the softmax, as transformers' eager attention does and the fused kernel does not. Nothing but queries, keys and values is
kept for the backward pass. Rows that are longer than a sliding window go the same way forwards.

Axis letters: R rows of a group, K key-value heads, G query heads per key-value head, L tokens of the group's longest row,
B queries of a block, S keys that a block may see, E head width.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.functional import scaled_dot_product_attention

from giong.engine.shapes import rounded

BLOCK_QUERIES = 256
"""Queries per block of a long row: smaller blocks compute fewer scores above the diagonal, larger ones use the cores better."""

MAX_SCORES = 1024 * 1024
"""Scores formed at once; rows are grouped up to this size so that short rows do not pay for a call each."""

MAX_PADDING = 1.2
"""Rows whose lengths differ by less than this factor may share a group; the shorter ones are padded inside it."""


@dataclass(frozen=True)
class RowGroup:
    """Rows that are computed as one batch: (start, length) of each in the pack, padded with zeros to `length`, a rounded one."""

    rows: tuple[tuple[int, int], ...]
    length: int


@lru_cache(maxsize=64)
def plan_groups(lengths: tuple[int, ...], num_heads: int) -> tuple[RowGroup, ...]:
    """Group rows of like length such that the scores of a group stay below `MAX_SCORES`."""
    starts = list(itertools.accumulate(lengths, initial=0))
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if groups:
            longest = rounded(lengths[groups[-1][0]])
            fits = (len(groups[-1]) + 1) * num_heads * longest**2 <= MAX_SCORES
            if fits and longest <= BLOCK_QUERIES and longest <= max(lengths[row] * MAX_PADDING, rounded(lengths[row])):
                groups[-1].append(row)
                continue
        groups.append([row])
    return tuple(RowGroup(tuple((starts[row], lengths[row]) for row in group), rounded(lengths[group[0]])) for group in groups)


def _take(tensor_HTE: torch.Tensor, group: RowGroup, num_kv_heads: int) -> torch.Tensor:
    """(heads, T, E) -> (R*K, G*L, E) of one group. Padding is zero: as a query it pulls at no key, as a key no query of its row sees it."""
    heads, _, width = tensor_HTE.shape
    taken = tensor_HTE.new_empty(len(group.rows), num_kv_heads, heads // num_kv_heads, group.length, width)
    for part, (start, length) in zip(taken, group.rows):
        part[:, :, :length] = tensor_HTE[:, start : start + length].view(num_kv_heads, -1, length, width)
        part[:, :, length:] = 0.0
    return taken.view(len(group.rows) * num_kv_heads, -1, width)


def _put(target_HTE: torch.Tensor, taken: torch.Tensor, group: RowGroup, num_kv_heads: int) -> None:
    """Inverse of `_take`; padding is left out."""
    heads, _, width = target_HTE.shape
    parts = taken.view(len(group.rows), num_kv_heads, heads // num_kv_heads, group.length, width)
    for part, (start, length) in zip(parts, group.rows):
        target_HTE[:, start : start + length].view(num_kv_heads, -1, length, width).copy_(part[:, :, :length])


@lru_cache(maxsize=64)
def _mask(num_queries: int, num_keys: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """(B, S): minus infinity where a query may not look (the future, and what lies before the window), else zero.

    Queries are the last B of S. Adding it is several times faster on a CPU than filling by a boolean mask.
    """
    distance = torch.arange(num_keys - num_queries, num_keys)[:, None] - torch.arange(num_keys)[None]
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


def _shares(query: torch.Tensor, key: torch.Tensor, num_queries: int, groups: int, window: int | None) -> torch.Tensor:
    """Softmax over the visible keys: query (R*K, G*B, E), scaled key (R*K, S, E) -> (R*K, G*B, S)."""
    scores = torch.bmm(query, key.transpose(1, 2))
    num_keys = key.shape[1]
    block = scores.view(-1, groups, num_queries, num_keys)
    if window is None:
        # Keys before the block are visible to all of its queries.
        block = block[..., num_keys - num_queries :]
        num_keys = num_queries
    block.add_(_mask(num_queries, num_keys, window, scores.dtype))
    return torch.softmax(scores, -1)


def _blocks(length: int, window: int | None) -> list[tuple[int, int, int]]:
    """(first key, first query, end) of each block of queries."""
    if length <= BLOCK_QUERIES * 3 // 2:
        return [(0, 0, length)]
    starts = range(0, length, BLOCK_QUERIES)
    return [(0 if window is None else max(0, a - window + 1), a, min(a + BLOCK_QUERIES, length)) for a in starts]


class _RowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query_HTE, key_KTE, value_KTE, lengths, scale, window):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(query_HTE, key_KTE, value_KTE)
        ctx.lengths, ctx.scale, ctx.window = lengths, scale, window
        output = torch.empty(query_HTE.shape, dtype=query_HTE.dtype)
        for start, end in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
            if window is None or end - start <= window:
                # Up to a rounded length what follows in the pack comes along: a row sees nothing behind it.
                reach = start + rounded(end - start)
                q, k, v = (tensor[None, :, start:reach] for tensor in (query_HTE, key_KTE, value_KTE))
                attended = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)[0]
                output[:, start:end] = attended[:, : end - start]
            else:
                _windowed_forward(*(tensor[:, start:end] for tensor in (output, query_HTE, key_KTE, value_KTE)), scale, window)
        return output

    @staticmethod
    def backward(ctx, grad_HTE):  # type: ignore[no-untyped-def]
        query_HTE, key_KTE, value_KTE = ctx.saved_tensors
        num_kv_heads = key_KTE.shape[0]
        groups_per_head = query_HTE.shape[0] // num_kv_heads
        grads = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in (query_HTE, key_KTE, value_KTE)]
        for group in plan_groups(ctx.lengths, query_HTE.shape[0]):
            q, k, v = _take(query_HTE, group, num_kv_heads), _scaled_keys(key_KTE, group, ctx.scale), _take(value_KTE, group, num_kv_heads)
            parts = _group_backward(q, k, v, _take(grad_HTE, group, num_kv_heads), groups_per_head, group.length, ctx.scale, ctx.window)
            for target, part in zip(grads, parts):
                _put(target, part, group, num_kv_heads)
        return *grads, None, None, None


def _windowed_forward(output_HLE, query_HLE, key_KLE, value_KLE, scale, window):  # type: ignore[no-untyped-def]
    """Attention of one row that is longer than its window, block by block: the fused kernel knows no windows."""
    num_heads, length, _ = query_HLE.shape
    num_kv_heads = key_KLE.shape[0]
    group = plan_groups((length,), num_heads)[0]
    q, k, v = _take(query_HLE, group, num_kv_heads), _scaled_keys(key_KLE, group, scale), _take(value_KLE, group, num_kv_heads)
    result = torch.empty_like(q)
    for low, start, end in _blocks(group.length, window):
        part = _queries(q, num_heads // num_kv_heads, group.length, start, end)
        shares = _shares(part, k[:, low:end], end - start, num_heads // num_kv_heads, window)
        _queries_out(result, torch.bmm(shares, v[:, low:end]), num_heads // num_kv_heads, group.length, start, end)
    _put(output_HLE, result, group, num_kv_heads)


def _group_backward(q, k, v, grad, groups_per_head, length, scale, window):  # type: ignore[no-untyped-def]
    blocks = _blocks(length, window)
    grad_q = torch.empty_like(q)
    if len(blocks) > 1:
        # Several blocks add to the same keys: in fp32, so that the sum is rounded once.
        grad_k, grad_v = (torch.zeros(t.shape, dtype=torch.promote_types(t.dtype, torch.float32)) for t in (k, v))
    for low, start, end in blocks:
        part_q = _queries(q, groups_per_head, length, start, end)
        part_g = _queries(grad, groups_per_head, length, start, end)
        shares = _shares(part_q, k[:, low:end], end - start, groups_per_head, window)
        of_value = torch.bmm(shares.transpose(1, 2), part_g)
        of_shares = torch.bmm(part_g, v[:, low:end].transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_shares, shares, -1, shares.dtype)
        _queries_out(grad_q, torch.bmm(of_scores, k[:, low:end]), groups_per_head, length, start, end)
        of_key = torch.bmm(of_scores.transpose(1, 2), part_q).mul_(scale)
        if len(blocks) == 1:
            return grad_q, of_key, of_value
        grad_k[:, low:end] += of_key
        grad_v[:, low:end] += of_value
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _scaled_keys(key_KTE: torch.Tensor, group: RowGroup, scale: float) -> torch.Tensor:
    """Keys less their mean over the row, times the scale. A constant added to all keys moves all scores of a query alike and
    no share at all, but large common parts (Qwen's key biases) would cost the bf16 scores their last digits."""
    num_kv_heads = key_KTE.shape[0]
    keys = _take(key_KTE, group, num_kv_heads)
    lengths = torch.tensor([length for _, length in group.rows], dtype=keys.dtype).repeat_interleave(num_kv_heads)
    return (keys - keys.sum(1, keepdim=True).div_(lengths[:, None, None])).mul_(scale)


def _queries(tensor: torch.Tensor, groups: int, length: int, start: int, end: int) -> torch.Tensor:
    """(R*K, G*L, E) -> (R*K, G*B, E): the block's queries of every head."""
    if start == 0 and end == length:
        return tensor
    return tensor.view(tensor.shape[0], groups, length, -1)[:, :, start:end].reshape(tensor.shape[0], groups * (end - start), -1)


def _queries_out(target: torch.Tensor, part: torch.Tensor, groups: int, length: int, start: int, end: int) -> None:
    target.view(target.shape[0], groups, length, -1)[:, :, start:end] = part.view(target.shape[0], groups, end - start, -1)


def row_attention(
    query_HTE: torch.Tensor,
    key_KTE: torch.Tensor,
    value_KTE: torch.Tensor,
    lengths: tuple[int, ...],
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention within each row: query (H, T, E), key and value (K, T, E), H a multiple of K -> (H, T, E).

    `window` limits each query to its last `window` tokens, itself included. CPU tensors only.
    """
    return _RowAttention.apply(query_HTE, key_KTE, value_KTE, lengths, scale, window)
