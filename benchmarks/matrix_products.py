"""The matrix products that a training step cannot do without: how much arithmetic they are, and how fast this machine does them.

One list serves both: what is counted as needed is what is measured as the roof. Left out on purpose, so that the share is of
matrix products alone: attention's scores (counted beside it), element-wise work, and everything that a cleverer program
would not do (padding, logits without loss, gradients of frozen weights, forward passes done twice).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from giong.contracts import ModelShape
from giong.sizing.flops import attention_flops_per_token
from giong.sizing.shapes import linear_layers

HEAD_LOGITS = 32 * 1024 * 1024
"""Logits that one measured product of the head makes, 64 MiB in bf16: 220 rows of a vocabulary of 152k are no thin product."""

WEIGHT_BYTES, MAX_WEIGHT_COPIES = 256 * 1024**2, 4
"""Weights are taken in turn from copies: a step meets each layer's weights cold, and a hot cache would raise the roof."""

NUM_SWEEPS, MIN_RUNS, MIN_SECONDS = 3, 3, 0.05
"""Of each product the fastest run counts, over sweeps that lie seconds apart: a roof is what the machine can do, and whatever
disturbs a run only lowers it."""


@dataclass(frozen=True, slots=True)
class MatrixProduct:
    """(num_rows x inner) times (inner x num_columns), `count` times per pass. `kind` says what for.

    `layout` is how the operands lie in memory, seen from x (tokens x in), W (out x in), dy (tokens x out):
    "forward" x W^T, "input_gradient" dy W, "weight_gradient" dy^T x.
    """

    kind: str
    layout: str
    num_rows: int
    inner: int
    num_columns: int
    count: int

    @property
    def key(self) -> tuple[str, str, int, int, int]:
        return self.kind, self.layout, self.num_rows, self.inner, self.num_columns

    @property
    def flops(self) -> float:
        return 2.0 * self.num_rows * self.inner * self.num_columns * self.count


def step_products(shape: ModelShape, method: str, lora_r: int, num_tokens: int, num_loss_tokens: int) -> list[MatrixProduct]:
    """All products of one forward and backward pass over a pack, the head on the positions with loss only.

    LoRA: 4 P + 6 P_lora operations per token (forward and input gradient of the frozen weights, all three of the adapter's);
    full: 6 P. The first layer's input gradient is counted too: under LoRA its query, key and value need none, one part in some
    hundred. Raises ValueError for an unknown method.
    """
    if method not in ("lora", "full"):
        raise ValueError(f"method must be `full` or `lora`, not {method!r}")
    full = method == "full"
    products: list[MatrixProduct] = []

    def linear(kind: str, tokens: int, inputs: int, outputs: int, count: int, *, trained: bool) -> None:
        products.append(MatrixProduct(kind, "forward", tokens, inputs, outputs, count))
        products.append(MatrixProduct(kind, "input_gradient", tokens, outputs, inputs, count))
        if trained:
            products.append(MatrixProduct(kind, "weight_gradient", outputs, tokens, inputs, count))

    layers = shape.num_hidden_layers
    for layer in linear_layers(shape):
        linear("linear", num_tokens, layer.in_features, layer.out_features, layers, trained=full)
        if not full:
            linear("adapter", num_tokens, layer.in_features, lora_r, layers, trained=True)
            linear("adapter", num_tokens, lora_r, layer.out_features, layers, trained=True)
    linear("head", num_loss_tokens, shape.hidden_size, shape.vocab_size, 1, trained=full)
    return products


def flops_per_token(products: Sequence[MatrixProduct], num_tokens: int) -> dict[str, float]:
    """Operations per token of the pack: in all ("total") and by kind."""
    kinds = {
        kind: sum(product.flops for product in products if product.kind == kind) / num_tokens for kind in ("linear", "adapter", "head")
    }
    return {"total": sum(kinds.values()), **kinds}


def attention_flops(shape: ModelShape, lengths: Sequence[int]) -> float:
    """Operations of causal attention's two products per token, forward and (twice as much) backward, over rows of these lengths."""
    mean_context = sum(length * length for length in lengths) / sum(lengths)
    return 3.0 * attention_flops_per_token(shape, mean_context)


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass over a pack holds, on average over a step."""

    num_passes: int
    num_tokens: int
    num_loss_tokens: int


def mean_pass(num_tokens: int, num_loss_tokens: int, max_tokens_per_pack: int) -> Pass:
    """A step cut into as few passes as the token budget allows, all alike."""
    num_passes = max(1, math.ceil(num_tokens / max_tokens_per_pack))
    return Pass(num_passes, round(num_tokens / num_passes), round(num_loss_tokens / num_passes))


def measure(products: Sequence[MatrixProduct], device: str, dtype: str) -> dict[str, Any]:
    """Time every product in `dtype`, alone: operations per second of all together and by kind, and seconds per pass."""
    timed: dict[tuple, float] = {}
    for _ in range(NUM_SWEEPS):
        # Layers repeat each other's shapes: each shape is timed once a sweep.
        for key, product in {product.key: product for product in products}.items():
            timed[key] = min(timed.get(key, math.inf), _seconds_of(product, device, dtype))
    seconds: dict[str, float] = {}
    flops: dict[str, float] = {}
    for product in products:
        seconds[product.kind] = seconds.get(product.kind, 0.0) + timed[product.key] * product.count
        flops[product.kind] = flops.get(product.kind, 0.0) + product.flops
    return {
        "flops_per_second": sum(flops.values()) / sum(seconds.values()),
        "by_kind": {kind: {"flops_per_second": flops[kind] / seconds[kind], "seconds_per_pass": seconds[kind]} for kind in flops},
    }


def _seconds_of(product: MatrixProduct, device: str, dtype: str) -> float:
    """Fewest seconds of one product; one that would make too large a result is timed on part of its rows."""
    import torch

    rows, inner, columns = product.num_rows, product.inner, product.num_columns
    part = rows
    if product.kind == "head":
        # The head's rows come in chunks in any program that does not keep all logits; its weight gradient sums over chunks.
        if product.layout == "weight_gradient":
            part, inner = rows, max(1, min(inner, HEAD_LOGITS // rows))
        else:
            part = max(1, min(rows, HEAD_LOGITS // max(inner, columns)))
    scale = (rows * product.inner) / (part * inner)

    number = getattr(torch, dtype)

    def matrix(height: int, width: int) -> torch.Tensor:
        return torch.randn(height, width, device=device).to(number)

    weight_bytes = number.itemsize * inner * columns
    copies = max(1, min(MAX_WEIGHT_COPIES, WEIGHT_BYTES // weight_bytes))
    if product.layout == "forward":
        left, rights = matrix(part, inner), [matrix(columns, inner).t() for _ in range(copies)]
    elif product.layout == "input_gradient":
        left, rights = matrix(part, inner), [matrix(inner, columns) for _ in range(copies)]
    else:
        left, rights = matrix(inner, part).t(), [matrix(inner, columns)]
    result = torch.empty(part, columns, dtype=number, device=device)

    # On a GPU one product alone would be timed together with its launch, which a step hides behind the product before.
    in_a_row = 1 if device == "cpu" else 20

    def once(turn: int) -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for launch in range(in_a_row):
            torch.mm(left, rights[(turn + launch) % len(rights)], out=result)
        if device != "cpu":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / in_a_row

    with torch.no_grad():
        once(0)
        found: list[float] = []
        while len(found) < MIN_RUNS or sum(found) * in_a_row < MIN_SECONDS:
            found.append(once(len(found)))
    return min(found) * scale
