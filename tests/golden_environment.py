"""What recorded figures (tests/golden) depend on beside this project: written with them, and named by a test that no longer meets them."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch


def environment(*packages: str) -> dict[str, str | int]:
    """torch, transformers and PEFT always: PEFT draws where an adapter starts."""
    return {
        **{name: version(name) for name in ("torch", "transformers", "peft", *packages)},
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
