"""Attention of packed rows through transformers' attention interface: each row sees itself only.

Rows of one pack are kept apart by their lengths and not by a mask: a mask of T x T would cost memory and time for pairs that
are never used. The implementation is switched on for the engine's own forward passes only; decoding keeps the model's.

One decision a reader may question: which kernel computes is read off one table (`KERNELS`, from the top, the first that is
there and serves), and never measured: a run that goes on after a kill must compute as it began.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from giong.engine.gpu_attention import (
    AttentionSettings,
    by_flash_attn,
    by_flex,
    by_torch_varlen,
    flash_attn_varlen,
    has_flash_capability,
    has_flex,
    torch_varlen,
)
from giong.engine.row_attention import row_attention
from giong.engine.virtual_tokens import PrefixStates
from giong.errors import ModelError

IMPLEMENTATION = "giong_packed"

HALF_PRECISION = (torch.bfloat16, torch.float16)
MAX_FLASH_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """What decides about the kernel. `same_width` says that values are as wide as keys."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    capped: bool = False
    dropped: bool = False
    same_width: bool = True
    causal: bool = True

    @property
    def suits_flash(self) -> bool:
        fits = self.head_dim % 8 == 0 and self.head_dim <= MAX_FLASH_HEAD_DIM and self.same_width
        return self.device_type == "cuda" and self.dtype in HALF_PRECISION and fits


@dataclass(frozen=True, slots=True)
class AttentionKernel:
    """One row of the table. `reason` says why it stands where it stands; `remedy` what makes it available."""

    name: str
    reason: str
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionSettings], torch.Tensor]
    serves: Callable[[AttentionCase], bool]
    is_there: Callable[[], bool] = lambda: True
    remedy: str = ""


def _by_blocks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, settings: AttentionSettings) -> torch.Tensor:
    output = row_attention(query[0], key[0], value[0], settings.lengths, scale=settings.scale, window=settings.window)
    return output.transpose(0, 1).unsqueeze(0)


def _by_sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, settings: AttentionSettings) -> torch.Tensor:
    lengths, asked = settings.lengths, (settings.scale, settings.dropout, settings.window, settings.softcap, settings.causal)
    if key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if len(set(lengths)) == 1:
        # Equal rows become a batch: one kernel call instead of one per row.
        split = [tensor.unflatten(2, (len(lengths), lengths[0]))[0].transpose(0, 1) for tensor in (query, key, value)]
        return _attend(*split, *asked).transpose(1, 2).flatten(0, 1).unsqueeze(0)
    rows = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)))
    return torch.cat([_attend(q, k, v, *asked) for q, k, v in rows], dim=2).transpose(1, 2)


KERNELS = (
    AttentionKernel(
        "rows in blocks", "on a CPU several times faster than torch's fused kernel in the backward pass", _by_blocks,
        lambda case: case.device_type == "cpu" and case.same_width and case.causal and not case.capped and not case.dropped,
    ),
    AttentionKernel(
        "torch varlen", "flash attention by row lengths that comes with torch: one call per pack, keys not repeated", by_torch_varlen,
        lambda case: case.suits_flash and not case.capped and not case.dropped,
        lambda: has_flash_capability() and torch_varlen() is not None, "pip install --upgrade torch",
    ),
    AttentionKernel(
        "flash-attn", "the same kernel with a soft cap and dropout, and for versions of torch without their own", by_flash_attn,
        lambda case: case.suits_flash,
        lambda: has_flash_capability() and flash_attn_varlen() is not None, "pip install flash-attn --no-build-isolation",
    ),
    AttentionKernel(
        "FlexAttention", "one compiled kernel for fp32, soft caps and older GPUs; blocks between rows are skipped", by_flex,
        lambda case: case.device_type == "cuda" and case.head_dim >= 16 and case.same_width and case.causal and not case.dropped,
        has_flex, "pip install triton",
    ),
    AttentionKernel("SDPA per row", "serves everything: one call per row, a mask only for windows and soft caps", _by_sdpa, lambda case: True),
)  # fmt: skip
"""From the top, the first that is there and serves."""


@functools.lru_cache(maxsize=64)
def choose(case: AttentionCase) -> AttentionKernel:
    """The kernel for a case. The last row serves all, so there always is one."""
    return next(kernel for kernel in KERNELS if kernel.serves(case) and kernel.is_there())


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
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    prefix: PrefixStates | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """query (1, heads, T, head_dim), key and value (1, key-value heads, T, head_dim) -> (1, T, heads, head_dim).

    `lengths` are the rows of the pack; `prefix` takes the place of some keys and values. Encoders say that their attention is not causal (`is_causal`, or the module's own). Raises ModelError for attention sinks (`s_aux`), which no kernel here computes, and for a row
    that is longer than a window that is in the mask alone.
    """
    if s_aux is not None:
        raise ModelError(
            "This family gives its attention sinks, which the engine's kernels do not compute", place=type(module).__name__,
            remedy="Use a family without them (Llama, Qwen, Gemma, Mistral, ...).",
        )  # fmt: skip
    if sliding_window is None:
        _check_window(module, max(lengths))
    if prefix is not None:
        key, value = prefix.put(module.layer_idx, key, value)
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    case = AttentionCase(
        query.device.type, query.dtype, query.shape[-1], softcap is not None, dropout > 0.0, value.shape[-1] == query.shape[-1], causal
    )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return choose(case).run(query, key, value, AttentionSettings(lengths, scale, sliding_window, softcap, dropout, causal)), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
    causal: bool,
) -> torch.Tensor:
    length = query.shape[2]
    windowed = sliding_window is not None and sliding_window < length
    if not windowed and softcap is None:
        return scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scaling, dropout_p=dropout)
    seen = torch.ones(length, length, dtype=torch.bool, device=query.device)
    if causal:
        seen = seen.tril()
    elif windowed:
        seen = seen.tril(sliding_window - 1)
    if windowed:
        seen = seen.triu(1 - sliding_window)
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling, dropout_p=dropout)
    scores = query @ key.transpose(-1, -2) * scaling
    scores = softcap * torch.tanh(scores.float() / softcap)
    shares = scores.masked_fill(~seen, float("-inf")).softmax(-1).to(value.dtype)
    return torch.nn.functional.dropout(shares, dropout) @ value


def check_chunks(model: PreTrainedModel, longest: int) -> None:
    """Raise ModelError where a row of `longest` tokens is longer than what a layer of the model looks at (Llama 4's chunks): that rule is
    in the mask, which nothing here reads. Shorter rows lie within one chunk."""
    config = model.config.get_text_config()
    size = getattr(config, "attention_chunk_size", None)
    if size and longest > size and "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise _out_of_reach(config, "chunks", size, longest)


def _check_window(module: torch.nn.Module, longest: int) -> None:
    """The same for a sliding window of which a layer tells its mask and not its attention (PhiMoE, Qwen2-MoE)."""
    config, modelling = getattr(module, "config", None), sys.modules[type(module).__module__]
    size = getattr(config, "sliding_window", None)
    # Of a window that no mask is made for (in the config of a Llama, say) nothing needs to be known.
    if not isinstance(size, int) or not 0 < size < longest or not hasattr(modelling, "create_sliding_window_causal_mask"):
        return
    kinds = getattr(config, "layer_types", None)
    if not kinds or kinds[module.layer_idx] == "sliding_attention":
        raise _out_of_reach(config, "windows", size, longest)


def _out_of_reach(config: PreTrainedConfig, what: str, size: int, longest: int) -> ModelError:
    return ModelError(
        f"Layers of the {config.model_type} family look at {what} of {size} tokens by their mask alone, and a row has {longest}",
        place=config.model_type, remedy=f"Set model.max_seq_length to {size} or less.",
    )  # fmt: skip


AttentionInterface.register(IMPLEMENTATION, packed_attention_forward)


@contextlib.contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within this block the model's forward expects `lengths=` and keeps packed rows apart.

    Raises ModelError for a family that says itself that its attention cannot be replaced, or that its layers hand a state from token
    to token. What else may mix the tokens of a row with others (a convolution, a rule that only a mask holds) is not seen here: the
    trial of `row_check.check_tokens` finds it before a model's numbers count.
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
