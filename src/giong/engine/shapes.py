"""Lengths that come again. For products in bf16 on a CPU oneDNN writes code for every new shape and keeps it: a millisecond or two and
half a megabyte of heap for each product of a length that was not seen before (benchmarks/new_shapes.py). So tokens of a pack, rows in
attention and positions at the head are brought to a multiple, a larger one the longer they are.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

LENGTH_MULTIPLE = 32
LENGTHS_PER_DOUBLING = 16
"""Of lengths that are twice as long, multiples are twice as large: a sixteenth is added at most, and a run meets few lengths whatever
its packs hold."""


def rounded(length: int) -> int:
    """The next multiple: 32 up to 1,024, then 64 up to 2,048, and so on."""
    multiple = max(LENGTH_MULTIPLE, (1 << max(length - 1, 1).bit_length()) // (2 * LENGTHS_PER_DOUBLING))
    return -(-length // multiple) * multiple


def writes_code(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products there are of this kind."""
    return device.type == "cpu" and dtype == torch.bfloat16


def padded(tensor: torch.Tensor) -> torch.Tensor:
    """(N, ...) -> (the next multiple of 32, ...), with zeros behind: for what is computed in chunks, whose sizes alone make shapes."""
    filler = -len(tensor) % LENGTH_MULTIPLE
    return pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, filler)) if filler else tensor
