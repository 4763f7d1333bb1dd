"""Packs on the device that computes, one ahead of the passes; and what this machine's engine would compute with.

One decision a reader may question: packs are laid out by the thread that trains, between two packs, and not by a worker
process: while a GPU computes, that thread has nothing else to do, and a pack takes less than a millisecond.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator

import torch

from giong.engine.attention import KERNELS, AttentionCase, choose
from giong.engine.compiled import has_triton, missing_to_compile
from giong.engine.kernel_choice import fused_kernels
from giong.engine.packing import Pack
from giong.models.devices import candidate_dtypes, move


def on_device(pack: Pack, device: torch.device) -> Pack:
    """The pack with every tensor on `device`; the pack itself if it lies there. `lengths` stay plain numbers of the host."""
    if pack.input_ids_T.device == device:
        return pack
    tensors = {field.name: getattr(pack, field.name) for field in dataclasses.fields(pack)}
    moved = {name: move(tensor, device) for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    return dataclasses.replace(pack, **moved, extras={name: move(tensor, device) for name, tensor in pack.extras.items()})


def packs_ahead(packs: Iterable[Pack], device: torch.device) -> Iterator[Pack]:
    """The packs on `device`, each asked for before the one ahead of it is handed out: a GPU finds the next in its queue.

    The copies stand in that queue between the computations and run beside none of them: a pack is kilobytes. What is saved is the host's
    wait, which lays out the next pack and pins it while the GPU is busy.
    """
    ahead: Pack | None = None
    for pack in packs:
        following = on_device(pack, device)
        if ahead is not None:
            yield ahead
        ahead = following
    if ahead is not None:
        yield ahead


def describe_engine(device: torch.device) -> list[tuple[str, str, str]]:
    """What the engine computes with on this device, and what is missing there: (status, part, sentence) each.

    `status` is "ok" for what is used and "optional" for what would be faster or do more; then the sentence holds a command.
    """
    dtype = torch.float32 if device.type == "cpu" else getattr(torch, candidate_dtypes(device)[0])
    plain = AttentionCase(device.type, dtype, 128)
    capped = dataclasses.replace(plain, capped=True)
    found = [
        ("ok", "attention", f"{choose(plain).name}: {choose(plain).reason}"),
        ("ok", "attention", f"{choose(capped).name} for families that cap scores (Gemma 2)"),
    ]
    for kernel in KERNELS:
        if (kernel.serves(plain) or kernel.serves(capped)) and kernel.remedy and not kernel.is_there():
            found.append(("optional", "attention", f"{kernel.name}, {kernel.reason}: {kernel.remedy}"))
    found.append(_describe_elementwise(device, dtype))
    missing = missing_to_compile(device)
    found.append(("optional", "compiler", missing) if missing else ("ok", "compiler", "torch.compile can be tried for long runs"))
    if device.type == "cuda":
        found.append(("ok", "allocator", _describe_allocator()))
        if dtype == torch.float32:
            found.append(("optional", "dtype", "this GPU does not multiply bf16, so models compute in fp32"))
    return found


def _describe_elementwise(device: torch.device, dtype: torch.dtype) -> tuple[str, str, str]:
    if device.type != "cuda":
        return ("ok", "kernels", "in place, norms, rotary positions and gated activations")
    if fused_kernels(device, dtype) is not None:
        return ("ok", "kernels", "fused in Triton: norms, rotary positions, gated activations, the head's softmax")
    if has_triton():
        return ("optional", "kernels", "this Triton does not give the engine's numbers and is not used: pip install --upgrade triton")
    return ("optional", "kernels", "in place; fused ones need Triton: pip install triton")


def _describe_allocator() -> str:
    given = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    return f"{torch.cuda.get_allocator_backend()}, {given or 'with its own settings'}"
