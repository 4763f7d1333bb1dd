"""Passes of a step side by side: each in a thread of its own with its share of the cores, instead of one after the other on all of them.

Products of the sizes that a small model has are not cut evenly: oneDNN runs many of them on one core of two, and every operation waits
for its slowest thread. Two passes of half the tokens keep as much for their backward passes as one, and need not wait for each
other (`benchmarks/lanes.py`).

Nothing depends on which thread is faster. A pass takes its random numbers from a seed that it was given, its gradients are added
in the order of the passes, and each is computed by its lane's share of the cores, also when it is the last one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from giong.engine.distributed import ALONE, Processes
from giong.engine.elementwise import EAGER, kernels
from giong.engine.lora_dropout import seeded
from giong.engine.lora_linear import lora_weights
from giong.models.nf4 import num_packed_weights
from giong.sizing import lanes

ROPES_WITH_STATE = ("dynamic", "longrope")
"""Rotary positions whose frequencies a module changes with the length that it was last asked for."""

Given, Made = TypeVar("Given"), TypeVar("Made")


def num_lanes(model: PreTrainedModel, lengths: Sequence[int], max_tokens: int, processes: Processes = ALONE) -> int:
    """How many passes over rows (or groups) of these lengths this process computes at a time, each of at most `max_tokens` over that number."""
    if processes.size > 1 or model.device.type != "cpu":
        return 1
    numbers = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    moving = sum(number for number, moves in numbers if moves) / (sum(number for number, _ in numbers) + num_packed_weights(model))
    width = model.config.get_text_config().hidden_size
    asked = lanes.num_lanes(lengths, max_tokens, width=width, moving_share=moving, num_threads=torch.get_num_threads())
    return asked if asked > 1 and may_share(model) else 1


def may_share(model: PreTrainedModel, *, training: bool = False) -> bool:
    """Whether threads can compute passes of this model beside each other, with numbers that do not depend on their order; `training` asks
    of a model in evaluation mode as if it were trained."""
    if model.device.type != "cpu" or kernels() is not EAGER:
        # A GPU has one queue, and compiled loops have their number of threads written into them.
        return False
    return not any(_has_state(module, training) for module in _parts(model))


def _parts(model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    """All modules but the dropout of LoRA layers, which draws from the seed of its pass (`lora_dropout`)."""
    own = {
        id(dropout)
        for layer in model.modules()
        if type(layer) is PeftLinear and not layer.lora_variant and lora_weights(layer) is not None
        for dropout in layer.lora_dropout.values()
    }
    return (module for module in model.modules() if id(module) not in own)


def _has_state(module: torch.nn.Module, training: bool) -> bool:
    """Whether it draws from torch's one generator, or keeps something of the pass that it computed last."""
    draws = isinstance(module, _DropoutNd) and module.p > 0
    # Attention drops its shares by a number alone, and what else a family drops is called so too; routers of experts have a jitter.
    draws = draws or any(
        isinstance(value, float) and value > 0 for name, value in vars(module).items() if "dropout" in name or "jitter" in name
    )
    ropes = getattr(module, "rope_type", "")
    has_state = any(rope in ROPES_WITH_STATE for rope in (ropes.values() if isinstance(ropes, dict) else [ropes]))
    return (draws and (training or module.training)) or has_state


def side_by_side(passes: Iterable[Given], compute: Callable[[Given], Made], num_lanes: int) -> Iterator[Made]:
    """What `compute` makes of each pass, in their order; close it (`contextlib.closing`) when it is left early.

    Raises what the first pass that failed raised, once no other is being computed; KeyboardInterrupt at once.
    """
    ahead: deque[Future[Made]] = deque()
    num_threads, waits = torch.get_num_threads(), True
    seeds = torch.Generator().manual_seed(int(torch.randint(2**63 - 1, ())))
    pool = ThreadPoolExecutor(num_lanes, "lane", torch.set_num_threads, (max(1, num_threads // num_lanes),))
    try:
        for given in passes:
            seed = int(torch.randint(2**63 - 1, (), generator=seeds))
            ahead.append(pool.submit(_with_seed, seed, compute, given))
            # A pass that waits for its turn has its gradients already.
            while len(ahead) > 2 * num_lanes:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except KeyboardInterrupt:
        # Who asks to stop at once does not wait for a pass of a large model.
        waits = False
        raise
    finally:
        pool.shutdown(waits, cancel_futures=True)
        # What a thread sets for itself is also what later threads of this process begin with.
        torch.set_num_threads(num_threads)


def _with_seed(seed: int, compute: Callable[[Given], Made], given: Given) -> Made:
    with seeded(seed):
        return compute(given)
