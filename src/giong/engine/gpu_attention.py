"""Attention of packed rows on a GPU: flash attention by row lengths, and FlexAttention with a mask made of blocks.

One decision a reader may question: FlexAttention's block mask is worked out from the rows' lengths by arithmetic over T tokens,
and not by `create_block_mask`, which fills a T x T mask first (1 GiB at 32k tokens) and does so for every new pack.

Axis letters: H query heads, K key-value heads, T tokens, E head width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from giong.models.devices import move

BLOCK_TOKENS = 128
"""Side of a block of FlexAttention's mask: its kernels' own default."""

MIN_FLEX_TOKENS = 2 * BLOCK_TOKENS
"""What packs of one block or less are filled up to. Fewer queries than a block are taken for decoding, whose kernels do not come in all dtypes; and a mask of
one block would be compiled by itself, since a size of one is never a variable of what torch compiles."""

MAX_FLEX_FORMS = 64
"""Forms of FlexAttention that torch keeps compiled. Each kind (a model's heads, scale and soft cap, with gradients or without) takes two, and
behind the eight that torch keeps by itself it computes T x T scores."""


@dataclass(frozen=True, slots=True)
class AttentionSettings:
    """What attention is asked for besides its tensors. `window` is the number of tokens that a query sees backwards, itself included;
    without `causal` (encoders) it sees as many forwards."""

    lengths: tuple[int, ...]
    scale: float
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0
    causal: bool = True


@functools.cache
def has_flash_capability() -> bool:
    """Flash attention needs tensor cores that multiply bf16: compute capability 8.0 (Ampere)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


@functools.cache
def torch_varlen() -> Callable | None:
    """Torch's own flash attention by row lengths; None in versions without windows or a scale."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = set(inspect.signature(varlen_attn).parameters)
    if not {"scale", "window_size"} <= known:
        return None
    # The kernel shares key heads by itself. Versions that have the flag (2.12) refuse to without it; 2.11 does not know it.
    return functools.partial(varlen_attn, enable_gqa=True) if "enable_gqa" in known else varlen_attn


@functools.cache
def flash_attn_varlen() -> Callable | None:
    """The flash-attn package's function; None where it is absent or built for another torch."""
    if find_spec("flash_attn") is None:
        return None
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


@functools.cache
def has_flex() -> bool:
    """Whether FlexAttention can be compiled here: it is only then a fused kernel."""
    takes_lengths = "seq_lengths" in inspect.signature(BlockMask.from_kv_blocks).parameters
    return takes_lengths and torch.cuda.is_available() and find_spec("triton") is not None


@functools.lru_cache(maxsize=64)
def cumulative_lengths(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Where rows begin and end: int32 (rows + 1), as flash attention wants it."""
    return move(torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32), device)


def _flash_window(settings: AttentionSettings) -> tuple[int, int]:
    # Flash attention counts the tokens to the left and to the right of the query and leaves the query itself out.
    side = -1 if settings.window is None else settings.window - 1
    return (side, 0 if settings.causal else side)


def _token_major(tensor_1HTE: torch.Tensor) -> torch.Tensor:
    return tensor_1HTE[0].transpose(0, 1)


def by_torch_varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, settings: AttentionSettings) -> torch.Tensor:
    """query (1, H, T, E), key and value (1, K, T, E) -> (1, T, H, E). No soft cap, no dropout."""
    starts, longest = cumulative_lengths(settings.lengths, query.device), max(settings.lengths)
    function = torch_varlen()
    assert function is not None
    output = function(
        _token_major(query), _token_major(key), _token_major(value), starts, starts, longest, longest,
        scale=settings.scale, window_size=_flash_window(settings),
    )  # fmt: skip
    return output.unsqueeze(0)


def by_flash_attn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, settings: AttentionSettings) -> torch.Tensor:
    """As `by_torch_varlen`, with soft cap and dropout."""
    starts, longest = cumulative_lengths(settings.lengths, query.device), max(settings.lengths)
    function = flash_attn_varlen()
    assert function is not None
    output = function(
        _token_major(query), _token_major(key), _token_major(value), starts, starts, longest, longest,
        dropout_p=settings.dropout, softmax_scale=settings.scale, causal=settings.causal, window_size=_flash_window(settings),
        softcap=settings.softcap or 0.0,
    )  # fmt: skip
    return output.unsqueeze(0)


def first_visible(lengths: tuple[int, ...], window: int | None) -> np.ndarray:
    """The first token that each token sees, (T,): its row's first, or the first of its window. It never falls."""
    starts = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    return starts if window is None else np.maximum(starts, np.arange(len(starts)) - window + 1)


@functools.lru_cache(maxsize=32)
def block_mask(lengths: tuple[int, ...], window: int | None, device: torch.device) -> BlockMask:
    """FlexAttention's mask of rows that see themselves only, causal, within `window`.

    Both ends of what a query sees move forward with the query, so the blocks that a block of queries touches are a range of
    neighbours, and so are those among them that are seen in full and need no mask.
    """
    first_T = first_visible(lengths, window)
    num_tokens = len(first_T)
    num_blocks = -(-num_tokens // BLOCK_TOKENS)
    low = np.arange(num_blocks) * BLOCK_TOKENS
    last = np.minimum(low + BLOCK_TOKENS, num_tokens) - 1
    touched_from, touched_to = first_T[low] // BLOCK_TOKENS, np.arange(num_blocks) + 1
    full_from = -(-first_T[last] // BLOCK_TOKENS)
    # A block of keys is seen in full when its last key is no later than the first query.
    full_to = (low + 1) // BLOCK_TOKENS
    blocks = np.arange(num_blocks)[None]
    full = (full_from[:, None] <= blocks) & (blocks < full_to[:, None])
    partial = (touched_from[:, None] <= blocks) & (blocks < touched_to[:, None]) & ~full
    first = move(torch.from_numpy(first_T), device)

    def mask_mod(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (key >= first[query])

    return BlockMask.from_kv_blocks(
        *_block_lists(partial, device), *_block_lists(full, device), BLOCK_SIZE=BLOCK_TOKENS, mask_mod=mask_mod,
        seq_lengths=(num_tokens, num_tokens),
    )  # fmt: skip


def _block_lists(chosen: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of chosen blocks per row of blocks, and their indices in front of all others."""
    counts = torch.from_numpy(chosen.sum(1).astype(np.int32))
    indices = torch.from_numpy(np.argsort(~chosen, axis=1, kind="stable").astype(np.int32))
    return move(counts[None, None], device), move(indices[None, None], device)


@functools.cache
def _capped(softcap: float) -> Callable:
    def score_mod(score: torch.Tensor, *place: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


@functools.cache
def _compiled_flex() -> Callable:
    # Not dynamic=True: that makes variables of the scale and the soft cap too, which FlexAttention cannot be traced with, so torch falls
    # back without a word to the T x T scores of the plain function. As it is, torch takes the first pack's length for a constant and
    # lengths for a variable from the second on; floats stay constants only if it is told so.
    compiled = torch.compile(flex_attention)

    def attend(*tensors: torch.Tensor, **settings: object) -> torch.Tensor:
        with torch._dynamo.config.patch(specialize_float=True, recompile_limit=MAX_FLEX_FORMS):
            return compiled(*tensors, **settings)

    return attend


def _filled_up(x_1HTE: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """With as many tokens of zeros behind, laid out as before: another order of the axes in memory would be compiled anew."""
    if x_1HTE.is_contiguous():
        return pad(x_1HTE, (0, 0, 0, num_tokens))
    return pad(x_1HTE.transpose(1, 2), (0, 0, 0, 0, 0, num_tokens)).transpose(1, 2)


def by_flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, settings: AttentionSettings) -> torch.Tensor:
    """query (1, H, T, E), key and value (1, K, T, E) -> (1, T, H, E). Causal, any dtype, soft cap and window; no dropout."""
    # A window that no row reaches makes the same mask as none, and a second one need not be kept.
    window = settings.window if settings.window is not None and settings.window < max(settings.lengths) else None
    attend = _compiled_flex() if query.is_cuda else flex_attention
    lengths, num_tokens = settings.lengths, query.shape[2]
    if num_tokens <= BLOCK_TOKENS:
        # A last row of zeros that no other row sees.
        query, key, value = (_filled_up(tensor, MIN_FLEX_TOKENS - num_tokens) for tensor in (query, key, value))
        lengths = (*lengths, MIN_FLEX_TOKENS - num_tokens)
    output = attend(
        query, key, value, score_mod=None if settings.softcap is None else _capped(settings.softcap),
        block_mask=block_mask(lengths, window, query.device), scale=settings.scale, enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return output[:, :, :num_tokens].transpose(1, 2)
