"""Dropout on the way into a low-rank update, as a seed: the backward pass draws the mask again, so that none is kept.

PEFT keeps a mask as wide as x in the compute dtype for every adapted matrix, seven in a layer of a Llama, and draws each element
by itself. Here 64 random bits decide four elements, and an element that is dropped is one whose bits are all cleared. The
distribution is dropout's (Srivastava et al. 2014) with a probability in steps of 2^-16; the mask is not the one that PEFT draws
from the same seed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch

_VALUES = 2**16
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of an element of x."""


class LoraDropout(NamedTuple):
    """Each element of x is zero with a probability of `num_dropped` / 2^16, as `seed` has it."""

    num_dropped: int
    seed: int

    def mask(self, x_TI: torch.Tensor) -> torch.Tensor | None:
        """Integers (T, in) of the width of x's elements: all bits set where the element stays, none where it is dropped. None where
        nothing is dropped."""
        if not self.num_dropped:
            return None
        generator = torch.Generator(x_TI.device).manual_seed(self.seed)
        words = torch.empty(-(-x_TI.numel() // 4), dtype=torch.int64, device=x_TI.device).random_(-(2**63), None, generator=generator)
        numbers_TI = words.view(torch.int16)[: x_TI.numel()].view(x_TI.shape)
        return numbers_TI.ge_(self.num_dropped - _VALUES // 2).neg_().to(_INTEGERS[x_TI.element_size()])

    @property
    def scale(self) -> float:
        """What makes up for the dropped elements, so that the mean stays."""
        return _VALUES / (_VALUES - self.num_dropped)


_of_thread = threading.local()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within this block the seeds of this thread's dropouts follow from `seed`, whatever other threads draw."""
    _of_thread.generator = torch.Generator().manual_seed(seed)
    try:
        yield
    finally:
        del _of_thread.generator


def is_seeded() -> bool:
    """Whether this thread is in a block `seeded`."""
    return hasattr(_of_thread, "generator")


def drawn_again() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """In a block `seeded`, what a computation runs in that is done twice (`context_fn` of torch's checkpoint): the second time it draws
    the seeds of the first."""
    return nullcontext(), _drawing_from(_of_thread.generator.get_state())


@contextmanager
def _drawing_from(state: torch.Tensor) -> Iterator[None]:
    generator = _of_thread.generator
    now = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(now)


def draw_dropout(probability: float) -> LoraDropout:
    """A dropout (`probability` below 1) with a seed of its own, on every device from the CPU: out of the block `seeded` from torch's generator."""
    if not probability:
        return LoraDropout(0, 0)
    seed = int(torch.randint(2**63 - 1, (), generator=getattr(_of_thread, "generator", None)))
    return LoraDropout(min(round(probability * _VALUES), _VALUES - 1), seed)


def dropped(x_TI: torch.Tensor, mask_TI: torch.Tensor | None) -> torch.Tensor:
    """A copy of x with zeros where `LoraDropout.mask` has them, not scaled; x itself without a mask."""
    if mask_TI is None:
        return x_TI
    return (x_TI.view(mask_TI.dtype) & mask_TI).view(x_TI.dtype)
