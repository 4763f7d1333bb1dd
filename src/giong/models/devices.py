"""Which device a model computes on, and how tensors get there.

One decision a reader may question: the device is no part of what a model *is* (its identity, a run's name); it is a fact of the
machine, like the number of threads, and stands in the record of the probe.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from dataclasses import replace
from pathlib import Path

import torch

from giong.errors import ConfigError
from giong.sizing.hardware import Machine, gpu_like, this_machine


def resolve_device(setting: str = "auto") -> torch.device:
    """The device that `model.device` stands for: CUDA where there is one, else the CPU.

    Raises ConfigError where CUDA is asked for and this torch or this machine has none.
    """
    if setting == "cpu" or (setting == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = f"it was built for CUDA {torch.version.cuda}, but finds no GPU" if torch.version.cuda else "it was built for the CPU alone"
        raise ConfigError(
            f"model.device is cuda, but torch {torch.__version__} cannot compute there: {built}", place="model.device",
            remedy="Set model.device to auto, or install torch for your CUDA (https://pytorch.org/get-started/locally).",
        )  # fmt: skip
    # By number: a model's parameters say cuda:0, and "cuda" alone is not equal to that.
    return torch.device("cuda", torch.cuda.current_device())


def candidate_dtypes(device: torch.device) -> tuple[str, ...]:
    """Number formats worth measuring on a device, that with the smaller weights first.

    On a GPU that multiplies bf16 nothing needs measuring: fp32 is several times slower and takes twice the memory.
    """
    if device.type != "cuda":
        return ("bfloat16", "float32")
    return ("bfloat16",) if torch.cuda.is_bf16_supported(including_emulation=False) else ("float32",)


def device_name(device: torch.device) -> str:
    """The device as messages and records call it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def machine_of(device: torch.device) -> Machine:
    """This machine as one that computes on `device`. Of that one's memory counts what this process holds (a base that is loaded already is
    part of what a run needs) and what nobody holds."""
    machine = this_machine()
    if device.type != "cuda":
        if machine.available_memory_bytes is None:
            return machine
        # Pages of files are given back, and count as available already.
        return replace(machine, available_memory_bytes=machine.available_memory_bytes + (_status_bytes("RssAnon") or 0))
    free, _ = torch.cuda.mem_get_info(device)
    return replace(machine, gpu=gpu_like(device_name(device), free + torch.cuda.memory_reserved(device)))


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; to a GPU through pinned memory, so that the host asks for the copy and does not wait for it."""
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        # Torch keeps the pinned block until the copy is done, also when nobody else holds it.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked for: before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


RESET_PEAK, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_bytes` count from now on; where the system cannot, it goes on counting from the process's start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        RESET_PEAK.write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """CUDA: the peak of what torch allocated. CPU: the whole process's peak resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (highest := _status_bytes("VmHWM")) is not None:
        return highest
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status_bytes(name: str) -> int | None:
    """A figure that Linux gives of this process; None elsewhere."""
    if not STATUS.is_file():
        return None
    found = [line.split()[1] for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else None


def resident_bytes() -> int | None:
    """Memory that this process has now; None where the system does not tell."""
    return _status_bytes("VmRSS")


def free_memory_bytes(device: torch.device) -> int | None:
    """What can still be allocated there, torch's own unused blocks included; None where the system does not tell."""
    if device.type != "cuda":
        return this_machine().available_memory_bytes
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
