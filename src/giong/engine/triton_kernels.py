"""What lies between the matrix products, fused for a GPU: the formulas of `elementwise.py`, one kernel each, in Triton.

On a GPU these operations are bound by memory and by launches, and the eager formulas read and write a tensor several times over.
Triton comes with torch there. The kernels compute in fp32 and round once, as the formulas do; they are used only if a trial on
random numbers shows the formulas' results, so an installation that cannot compile them is passed over and nothing breaks.

One decision a reader may question: kernels of our own where liger-kernel has its own. Measured beside them, liger's took longer
backwards, and its loss waits for the host at every call (docs/decisions/0008-cuda-and-memory.md).

Axis letters: N positions with loss, V vocabulary, T tokens, D width, F width of the MLP, H heads, E head width, R rank, N columns of a sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from giong.engine.elementwise import Kernels

SILU, GELU, GELU_TANH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_ACTIVATIONS = {"silu": SILU, "gelu": GELU, "gelu_pytorch_tanh": GELU_TANH}

GATED_BLOCK = 2048
"""Elements per program."""

LOGITS_BLOCK = 16384
"""Logits of one position that are looked at together."""

NORM_ELEMENTS = 2048
"""Elements per program and turn: several rows where rows are short."""

GAIN_TURNS = 16
"""Turns of one program where the gain has a gradient: each program sums its own rows, and so many fewer sums are left."""

TURN_TOKENS = 32
"""Tokens per program of a rotation."""

SUM_TOKENS, SUM_COLUMNS = 32, 256
"""Of an update's sum, what one program adds to."""

MAX_SUM_RANK = 64
"""Up to here the product is free beside the reading and writing of its sum."""


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    # The exponential may overflow to infinity, which is the right limit.
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _logprobs_kernel(  # type: ignore[no-untyped-def]
    logits, stride, targets, logprobs, columns, scale, softcap,
    HAS_CAP: tl.constexpr, NEEDS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One position per program. The largest logit and the sum of exponentials grow together (Milakov and Gimelshein 2018, 1805.02867)."""
    position = tl.program_id(0).to(tl.int64)
    logits += position * stride
    target = tl.load(targets + position)
    highest = float("-inf")
    total = 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        x = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32) * scale
        if HAS_CAP:
            x = tl.where(inside, softcap * _tanh(x / softcap), float("-inf"))
        above = tl.maximum(highest, tl.max(x))
        total = total * tl.exp(highest - above) + tl.sum(tl.exp(x - above))
        highest = above
    chosen = tl.load(logits + target).to(tl.float32) * scale
    if HAS_CAP:
        chosen = softcap * _tanh(chosen / softcap)
    tl.store(logprobs + position, chosen - highest - tl.log(total))
    # The target's logit must be read before the gradient is written over it.
    tl.debug_barrier()
    if NEEDS_GRADIENT:
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < columns
            x = tl.load(logits + column, mask=inside, other=0.0).to(tl.float32) * scale
            if HAS_CAP:
                x = softcap * _tanh(x / softcap)
            gradient = tl.exp(x - highest) / total - tl.where(column == target, 1.0, 0.0)
            if HAS_CAP:
                gradient *= 1.0 - (x / softcap) * (x / softcap)
            tl.store(logits + column, gradient * scale, mask=inside)


def logprobs_and_gradient(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, logprobs_N: torch.Tensor, softcap: float | None, scale: float, needs_gradient: bool
) -> None:
    """As `elementwise.logprobs_and_gradient`."""
    num_positions, vocabulary = logits_NV.shape
    if num_positions == 0:
        return
    block = min(LOGITS_BLOCK, triton.next_power_of_2(vocabulary))
    with torch.cuda.device_of(logits_NV):
        _logprobs_kernel[(num_positions,)](
            logits_NV, logits_NV.stride(0), targets_N, logprobs_N, vocabulary, scale, 1.0 if softcap is None else softcap,
            HAS_CAP=softcap is not None, NEEDS_GRADIENT=needs_gradient, BLOCK=block, num_warps=max(4, block // 1024),
        )  # fmt: skip


@triton.jit
def _norm_forward_kernel(  # type: ignore[no-untyped-def]
    x, stride, weight, output, tokens, epsilon, offset,
    WIDTH: tl.constexpr, ROUNDS_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (token < tokens)[:, None] & (column < WIDTH)[None, :]
    value = tl.load(x + token[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    normal = value * tl.rsqrt(tl.sum(value * value, 1) / WIDTH + epsilon)[:, None]
    gain = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    if ROUNDS_FIRST:
        normal = normal.to(output.dtype.element_ty).to(tl.float32)
    tl.store(output + token[:, None] * WIDTH + column[None, :], normal * (gain + offset)[None, :], mask=inside)


@triton.jit
def _norm_backward_kernel(  # type: ignore[no-untyped-def]
    grad, grad_stride, x, stride, gain, of_x, of_gain, tokens, epsilon,
    WIDTH: tl.constexpr, NEEDS_GAIN: tl.constexpr, TURNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    factor = tl.load(gain + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    summed = tl.zeros((BLOCK,), dtype=tl.float32)
    for turn in range(TURNS):
        token = (program * TURNS + turn) * ROWS + tl.arange(0, ROWS)
        inside = (token < tokens)[:, None] & (column < WIDTH)[None, :]
        value = tl.load(x + token[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        given = tl.load(grad + token[:, None] * grad_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, 1) / WIDTH + epsilon)[:, None]
        pulled = given * factor
        pull = tl.sum(pulled * value, 1)[:, None] * scale * scale / WIDTH
        tl.store(of_x + token[:, None] * WIDTH + column[None, :], (pulled - value * pull) * scale, mask=inside)
        if NEEDS_GAIN:
            summed += tl.sum(given * value * scale, 0)
    if NEEDS_GAIN:
        tl.store(of_gain + program * WIDTH + column, summed, mask=column < WIDTH)


def _norm_blocks(width: int) -> tuple[int, int, int]:
    """(rows per turn, columns, warps) of a program over rows of this width."""
    block = triton.next_power_of_2(width)
    rows = max(1, NORM_ELEMENTS // block)
    return rows, block, min(16, max(4, rows * block // 512))


def norm_forward(x_TD: torch.Tensor, weight_D: torch.Tensor, offset: float, epsilon: float) -> torch.Tensor:
    """As `elementwise.norm_forward`."""
    x_TD = _with_contiguous_rows(x_TD)
    num_tokens, width = x_TD.shape
    output = torch.empty((num_tokens, width), dtype=x_TD.dtype, device=x_TD.device)
    rows, block, num_warps = _norm_blocks(width)
    with torch.cuda.device_of(x_TD):
        _norm_forward_kernel[(triton.cdiv(num_tokens, rows),)](
            x_TD, x_TD.stride(0), weight_D, output, num_tokens, epsilon, offset,
            WIDTH=width, ROUNDS_FIRST=offset == 0.0, ROWS=rows, BLOCK=block, num_warps=num_warps,
        )  # fmt: skip
    return output


def norm_backward(
    grad_TD: torch.Tensor, x_TD: torch.Tensor, gain_D: torch.Tensor, epsilon: float, needs_gain: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `elementwise.norm_backward`."""
    grad_TD, x_TD = _with_contiguous_rows(grad_TD), _with_contiguous_rows(x_TD)
    num_tokens, width = x_TD.shape
    rows, block, num_warps = _norm_blocks(width)
    turns = GAIN_TURNS if needs_gain else 1
    num_programs = triton.cdiv(num_tokens, rows * turns)
    of_x = torch.empty((num_tokens, width), dtype=x_TD.dtype, device=x_TD.device)
    sums = torch.empty((num_programs, width), dtype=torch.float32, device=x_TD.device) if needs_gain else None
    with torch.cuda.device_of(x_TD):
        _norm_backward_kernel[(num_programs,)](
            grad_TD, grad_TD.stride(0), x_TD, x_TD.stride(0), gain_D, of_x, of_x if sums is None else sums, num_tokens, epsilon,
            WIDTH=width, NEEDS_GAIN=needs_gain, TURNS=turns, ROWS=rows, BLOCK=block, num_warps=num_warps,
        )  # fmt: skip
    return of_x, None if sums is None else sums.sum(0)


def _with_contiguous_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@triton.jit
def _turn_kernel(  # type: ignore[no-untyped-def]
    x, head_stride, token_stride, cos, cos_stride, sin, sin_stride, output, output_head_stride, output_token_stride, tokens, sign,
    HALF: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    head = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (token < tokens) & (column < HALF)
    x += head * head_stride + token * token_stride + column
    first = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + HALF, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + token * cos_stride + column, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + token * sin_stride + column, mask=inside, other=0.0).to(tl.float32) * sign
    output += head * output_head_stride + token * output_token_stride + column
    tl.store(output, first * c - second * s, mask=inside)
    tl.store(output + HALF, second * c + first * s, mask=inside)


def turn(x_HTE: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor, sign: float) -> torch.Tensor:
    """As `elementwise.turn`, but laid out in memory as x is: the attention kernels and the projections around them want it so."""
    x_HTE, cos_TE, sin_TE = _with_contiguous_rows(x_HTE), _with_contiguous_rows(cos_TE), _with_contiguous_rows(sin_TE)
    num_heads, num_tokens, width = x_HTE.shape
    output = torch.empty_like(x_HTE)
    with torch.cuda.device_of(x_HTE):
        _turn_kernel[(triton.cdiv(num_tokens, TURN_TOKENS), num_heads)](
            x_HTE, x_HTE.stride(0), x_HTE.stride(1), cos_TE, cos_TE.stride(0), sin_TE, sin_TE.stride(0),
            output, output.stride(0), output.stride(1), num_tokens, sign,
            HALF=width // 2, TOKENS=TURN_TOKENS, BLOCK=triton.next_power_of_2(width // 2), num_warps=4,
        )  # fmt: skip
    return output


@triton.jit
def _value_and_slope(x, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    if ACTIVATION == SILU:
        share = tl.sigmoid(x)
        slope = share + x * share * (1.0 - share)
    elif ACTIVATION == GELU:
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        bent = _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        share = 0.5 * (1.0 + bent)
        slope = share + 0.5 * x * (1.0 - bent * bent) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    return x * share, slope


@triton.jit
def _gated_forward_kernel(gate, up, hidden, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    value, _slope = _value_and_slope(tl.load(gate + place, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    tl.store(hidden + place, value * tl.load(up + place, mask=inside, other=0.0).to(tl.float32), mask=inside)


@triton.jit
def _gated_backward_kernel(grad, gate, up, of_up, hidden, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    given = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    value, slope = _value_and_slope(tl.load(gate + place, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    tl.store(hidden + place, value * other, mask=inside)
    tl.store(of_up + place, value * given, mask=inside)
    tl.store(grad + place, given * other * slope, mask=inside)


def gated_forward(gate_TF: torch.Tensor, up_TF: torch.Tensor, activation: str) -> torch.Tensor:
    """As `elementwise.gated_forward`."""
    gate_TF, up_TF = gate_TF.contiguous(), up_TF.contiguous()
    hidden, size = torch.empty_like(gate_TF), gate_TF.numel()
    with torch.cuda.device_of(gate_TF):
        _gated_forward_kernel[(triton.cdiv(size, GATED_BLOCK),)](
            gate_TF, up_TF, hidden, size, ACTIVATION=_ACTIVATIONS[activation], BLOCK=GATED_BLOCK, num_warps=4
        )
    return hidden


def gated_backward(
    grad_TF: torch.Tensor, gate_TF: torch.Tensor, up_TF: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `elementwise.gated_backward`."""
    grad_TF, gate_TF, up_TF = grad_TF.contiguous(), gate_TF.contiguous(), up_TF.contiguous()
    of_up, hidden, size = torch.empty_like(up_TF), torch.empty_like(gate_TF), gate_TF.numel()
    with torch.cuda.device_of(gate_TF):
        _gated_backward_kernel[(triton.cdiv(size, GATED_BLOCK),)](
            grad_TF, gate_TF, up_TF, of_up, hidden, size, ACTIVATION=_ACTIVATIONS[activation], BLOCK=GATED_BLOCK, num_warps=4
        )
    return grad_TF, of_up, hidden


@triton.jit
def _add_product_kernel(  # type: ignore[no-untyped-def]
    output, stride, left, left_stride, right, row_stride, column_stride, tokens, columns, scale,
    RANK: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, BLOCK)
    here, among, within = (token < tokens)[:, None], (column < columns)[None, :], rank < RANK
    a = tl.load(left + token[:, None] * left_stride + rank[None, :], mask=here & within[None, :], other=0.0)
    b = tl.load(right + rank[:, None] * row_stride + column[None, :] * column_stride, mask=within[:, None] & among, other=0.0)
    if INTERPRETED:
        # The interpreter would multiply the bits of bf16 as if they were whole numbers.
        a, b = a.to(tl.float32), b.to(tl.float32)
    place = output + token[:, None] * stride + column[None, :]
    before = tl.load(place, mask=here & among, other=0.0).to(tl.float32)
    tl.store(place, before + scale * tl.dot(a, b), mask=here & among)


def add_product(output_TN: torch.Tensor, left_TR: torch.Tensor, right_RN: torch.Tensor, scale: float) -> None:
    """As `elementwise.add_product`: for a small rank cuBLAS takes half as long again as its one reading and writing of the output."""
    num_tokens, num_columns = output_TN.shape
    rank = left_TR.shape[1]
    rows_are_dense = output_TN.stride(1) == 1 and left_TR.stride(1) == 1
    if rank > MAX_SUM_RANK or output_TN.dtype == torch.float32 or not rows_are_dense:
        # In fp32 Triton's product would round its operands to tf32.
        output_TN.addmm_(left_TR, right_RN, alpha=scale)
        return
    with torch.cuda.device_of(output_TN):
        _add_product_kernel[(triton.cdiv(num_tokens, SUM_TOKENS), triton.cdiv(num_columns, SUM_COLUMNS))](
            output_TN, output_TN.stride(0), left_TR, left_TR.stride(0), right_RN, *right_RN.stride(), num_tokens, num_columns, scale,
            RANK=rank, TOKENS=SUM_TOKENS, COLUMNS=SUM_COLUMNS, BLOCK=max(16, triton.next_power_of_2(rank)),
            INTERPRETED=triton.knobs.runtime.interpret, num_warps=4,
        )  # fmt: skip


TRITON = Kernels(norm_forward, norm_backward, turn, gated_forward, gated_backward, logprobs_and_gradient, add_product)
