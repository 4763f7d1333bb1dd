"""What to do when a step does not fit into memory: smaller packs, the same rows, the same gradient.

Packing never changes a number beyond rounding, so the effective batch survives; the order of additions does change, and what
dropout drops, so the smaller budget is part of the run's state from then on.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from giong.engine.optimizer import MasterOptimizer
from giong.engine.packing import plan_packs
from giong.errors import ResourceError

# PyTorch has a class of its own for accelerators only; on a CPU the allocator's words are all there is.
CPU_ALLOCATOR_WORDS = ("not enough memory", "can't allocate memory", "Cannot allocate memory", "std::bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that an allocation failed, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in CPU_ALLOCATOR_WORDS)


def smaller_budget(lengths: Sequence[int], max_tokens: int) -> int | None:
    """Half of the largest pack of several rows that this budget makes of `lengths`; None when each row already stands alone."""
    packs = plan_packs(lengths, max_tokens)
    shared = [sum(lengths[index] for index in members) for members in packs if len(members) > 1]
    return max(shared) // 2 if shared else None


def release_memory() -> None:
    """Give back what a failed pass still holds. Call it outside the `except` block, whose exception keeps the pass alive."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def drop_gradients(optimizer: MasterOptimizer) -> None:
    """Forget what a failed step has accumulated."""
    for name, parameter in optimizer.parameters.items():
        master = optimizer.masters[name]
        if master is not parameter:
            parameter.grad = None
        master.grad.zero_()


@contextmanager
def memory_errors(message: str) -> Iterator[None]:
    """Around what smaller packs cannot help: raises ResourceError with this sentence where memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise ResourceError(
                message, remedy="Train fewer weights (method.name: lora, a lower method.lora_r), or take a smaller model."
            ) from error
        raise
