"""Frozen matrices in 4 bits: NF4 in blocks of 64 with one scale each, the scales in 8 bits (Dettmers et al. 2023, 2305.14314, section 3).

One decision a reader may question: bitsandbytes packs and unpacks, and the layer is giong's own. Its `Linear4bit` reaches for a kernel
from a model hub on some processors; and a plain linear layer whose weight is unpacked when it is read is one that PEFT and the
engine know already. The unpacked matrix lives as long as one product.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

BLOCK_SIZE = 64
"""Weights that share a scale."""


def functional() -> ModuleType:
    """`bitsandbytes.functional`, which is only there where the extra `qlora` is installed."""
    from bitsandbytes import functional as module

    return module


class Nf4Linear(torch.nn.Linear):
    """A linear layer over a frozen packed matrix; `weight` (out, in) is unpacked anew whenever it is read."""

    def __init__(self, layer: torch.nn.Linear | Conv1D) -> None:
        torch.nn.Module.__init__(self)
        self.transposed = isinstance(layer, Conv1D)
        weight = layer.weight.data.T.contiguous() if self.transposed else layer.weight.data
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        packed, self.state = functional().quantize_4bit(weight, blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4")
        self.register_buffer("packed", packed, persistent=False)
        self.bias = layer.bias

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return functional().dequantize_4bit(self.packed, self.state)

    @property
    def num_bytes(self) -> int:
        """Of the packed matrix and of all that is needed to unpack it (the two code books are shared)."""
        scales = self.state.absmax, self.state.state2.absmax, self.state.offset
        return self.packed.nbytes + sum(tensor.nbytes for tensor in scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Product.apply(x, self.bias, self)

    def unpacked(self) -> torch.nn.Linear | Conv1D:
        """A layer of the kind that this one was made of, with the weights that it computes with."""
        weight = self.weight
        layer = Conv1D(self.out_features, self.in_features) if self.transposed else torch.nn.Linear(1, 1, bias=self.bias is not None)
        layer.weight = torch.nn.Parameter(weight.T.contiguous() if self.transposed else weight, requires_grad=False)
        if not self.transposed:
            layer.in_features, layer.out_features = self.in_features, self.out_features
        layer.bias = self.bias
        return layer


class _Product(torch.autograd.Function):
    """x W^T + b, which keeps neither W nor x for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: Nf4Linear) -> torch.Tensor:
        ctx.layer = layer
        return linear(x, layer.weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        needs_x, needs_bias, _ = ctx.needs_input_grad
        return grad @ ctx.layer.weight if needs_x else None, grad.flatten(0, -2).sum(0) if needs_bias else None, None


def pack_matrices(model: PreTrainedModel) -> None:
    """Put every linear layer of `model` but the output head into 4 bits, in place, one at a time."""
    head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear | Conv1D) and layer is not head and not isinstance(layer, Nf4Linear):
            model.set_submodule(name, Nf4Linear(layer).requires_grad_(False))


def unpack_matrices(model: torch.nn.Module) -> None:
    """The inverse, up to what 4 bits lost."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Nf4Linear):
            parent = model.get_submodule(name.rpartition(".")[0])
            # PEFT's layer over a transposed matrix has to know it.
            if hasattr(parent, "fan_in_fan_out"):
                parent.fan_in_fan_out = layer.transposed
            setattr(parent, name.rpartition(".")[2], layer.unpacked())


def bytes_per_weight(model: torch.nn.Module) -> float | None:
    """Measured on the packed matrices; None for a model without."""
    num_bytes = sum(layer.num_bytes for layer in model.modules() if isinstance(layer, Nf4Linear))
    return num_bytes / num_packed_weights(model) if num_bytes else None


def num_packed_weights(model: torch.nn.Module) -> int:
    """Weights of `model` in 4 bits, which are no parameters of it."""
    return sum(layer.in_features * layer.out_features for layer in model.modules() if isinstance(layer, Nf4Linear))
