"""Checkpoints of a training run: one folder per step, whole or absent, the newest K kept.

A checkpoint holds the fp32 masters, the optimizer's state and the number of the step; order and dropout follow from the
seed and that number, so nothing else is needed to go on to the same bytes.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from giong.errors import ResourceError
from giong.models.saving import system_errors
from giong.workspace import atomic_folder, read_json, remove_folder, write_json


def save_checkpoint(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], keep: int) -> Path:
    """Write `folder`/step-NNNNNNNN and remove all but the newest `keep`."""
    path = folder / f"step-{step:08d}"
    needed_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    folder.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes + 16 * 1024 * 1024:
        raise ResourceError(
            f"The disk is nearly full: a checkpoint takes {needed_bytes / 1e6:.3g} MB and some room, {free_bytes / 1e6:.3g} MB are free",
            place=str(folder),
            remedy="Free some space and run the same command again: it goes on from the last checkpoint.",
        )  # fmt: skip
    with atomic_folder(path) as temporary:
        with system_errors():
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / "state.safetensors")
        write_json(temporary / "state.json", {"step": step, **state})
    prune_checkpoints(folder, keep)
    return path


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep`. One that cannot be removed only takes room."""
    for old in list_checkpoints(folder)[:-keep]:
        with contextlib.suppress(OSError):
            remove_folder(old)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first. What a kill left half-written has a dot in front and is swept away."""
    if not folder.is_dir():
        return []
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and state of one checkpoint."""
    return load_file(path / "state.safetensors"), read_json(path / "state.json")
