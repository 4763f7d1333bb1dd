"""What this machine has, read from the system's own files, and a table of reference machines.

A container's memory limit counts as the machine's memory, because it is the limit, and not the host's RAM, that kills a run.
What a system does not tell is None ("unknown"), never a guess. GPUs are sized from the table; none is looked for here: `Machine.gpu` is
for whoever can see one to fill in.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

NOTED_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile", "asimd", "sve", "bf16", "i8mm")
"""CPU features that decide which number format is fast."""

NO_LIMIT_BYTES = 2**60
"""Control groups without a limit report a number near 2^63; anything above this is none."""


@dataclass(frozen=True, slots=True)
class Machine:
    """This machine as a process sees it. None stands for "the system does not tell"; without `gpu`, runs compute on the CPU."""

    num_cores: int
    cpu_model: str
    cpu_flags: frozenset[str]
    clock_hz: float | None
    total_memory_bytes: int | None
    available_memory_bytes: int | None
    memory_limit_bytes: int | None
    free_disk_bytes: int
    gpu: ComputeDevice | None = None


REACHED_BANDWIDTH = 0.5
"""Share of its nominal bandwidth that memory gives at least, on a machine that others share. The norms of `engine.triton_kernels` reach
0.7 on an H200 (`benchmarks/gpu_kernels.py`)."""


@dataclass(frozen=True, slots=True)
class ComputeDevice:
    """What a run computes on, by nominal figures. `peak_flops` is dense bf16 with fp32 sums (for CPUs: of the format that is fastest there).

    `low_utilisation` and `high_utilisation` bound the usual share of the peak that a training step reaches. `memory_bytes` is None
    where the system does not tell.
    """

    name: str
    memory_bytes: int | None
    peak_flops: float
    bandwidth_bytes_per_second: float
    low_utilisation: float
    high_utilisation: float
    kind: Literal["gpu", "cpu"] = "gpu"

    @property
    def reached_bandwidth(self) -> float:
        """Bytes per second that can be counted on."""
        return REACHED_BANDWIDTH * self.bandwidth_bytes_per_second


GPU_LOW_UTILISATION, GPU_HIGH_UTILISATION = 0.20, 0.55
"""Share of a GPU's nominal peak that training reaches, attention's operations counted as in `sizing.flops`.

Measured are two points, both LoRA of rank 16 on an H200, rows of 1,900 tokens in one pass of 15,266: 0.366 at the shape of Qwen2.5-1.5B and
0.497 at that of Llama-3.1-8B (`benchmarks/results/train_speed-lora-*.json`); wider layers reach more. The top leaves a tenth above the
better one. The bottom is a margin and not a measurement: for passes of 2,048 tokens, short rows, narrower models, and GPUs that hold
less of their nominal rate (in the same runs TRL's fastest setting reached 0.217 and 0.342).
"""


def _gpu(name: str, memory_gb: int, bf16_teraflops: float, bandwidth_gb_per_second: float) -> ComputeDevice:
    return ComputeDevice(
        name, memory_gb * 10**9, bf16_teraflops * 1e12, bandwidth_gb_per_second * 1e9, GPU_LOW_UTILISATION, GPU_HIGH_UTILISATION
    )


REFERENCE_DEVICES = (
    _gpu("RTX 3090", 24, 71, 936),
    _gpu("RTX 4090", 24, 165, 1008),
    _gpu("L4", 24, 121, 300),
    _gpu("L40S", 48, 362, 864),
    _gpu("A100 PCIe", 80, 312, 1935),
    _gpu("A100 SXM", 80, 312, 2039),
    _gpu("H100 PCIe", 80, 756, 2000),
    _gpu("H100 SXM", 80, 989, 3350),
    _gpu("H200", 141, 989, 4800),
    _gpu("B200", 180, 2250, 7700),
    # 8 cores x 3.5 GHz x 32 fp32 operations per cycle; two channels of DDR4-3200.
    ComputeDevice("CPU, 8 cores, AVX2", 32 * 10**9, 0.9e12, 51e9, 0.05, 0.30, "cpu"),
    # 32 cores x 2 GHz x 1 024 bf16 operations per cycle; eight channels of DDR5-4800.
    ComputeDevice("CPU, 32 cores, AMX", 256 * 10**9, 65e12, 307e9, 0.05, 0.30, "cpu"),
)
"""Nominal figures of the makers' data sheets: dense bf16 without sparsity, the 80 GB versions of A100 and H100."""

CPU_BANDWIDTH_BYTES_PER_SECOND = 40e9
"""Of a CPU whose memory is not known: two channels of DDR4-2666."""

CPU_LOW_UTILISATION, CPU_HIGH_UTILISATION = 0.05, 0.30
"""Share of a CPU's peak that training reaches; the spread is why a probe is better than this table."""

DEFAULT_CLOCK_HZ = 2.5e9


def this_machine(path: str | Path = ".", *, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> Machine:
    """Read this machine; free disk is that of `path`. `proc` and `cgroup` are where the system's files lie."""
    cpu_model, flags, clock_hz = parse_cpuinfo(_read(proc / "cpuinfo"))
    total, available = _physical_memory(proc)
    limit, free_in_limit = cgroup_memory(proc, cgroup)
    if limit is not None:
        total = limit if total is None else min(total, limit)
        available = free_in_limit if available is None else min(available, free_in_limit)
    return Machine(
        num_cores=_num_cores(proc, cgroup),
        cpu_model=cpu_model or platform.processor() or platform.machine(),
        cpu_flags=flags,
        clock_hz=clock_hz,
        total_memory_bytes=total,
        available_memory_bytes=available,
        memory_limit_bytes=limit,
        free_disk_bytes=shutil.disk_usage(path).free,
    )


def peak_flops(machine: Machine, dtype: str) -> float:
    """Highest operations per second of this CPU in `dtype`, from cores, clock and features; within a factor of two.

    Operations per core and cycle: AMX 1 024 (bf16), AVX-512 BF16 64, AVX-512 and AVX2 32 (chips with one 512-bit unit; twice
    that with two), otherwise 8. bf16 without such a feature runs as fp32.
    """
    flags, per_cycle = machine.cpu_flags, 8
    if flags & {"avx2", "avx512f"}:
        per_cycle = 32
    if dtype == "bfloat16" and flags & {"avx512_bf16", "bf16"}:
        per_cycle = 64 if "avx512_bf16" in flags else 32
    if dtype == "bfloat16" and "amx_bf16" in flags:
        per_cycle = 1024
    return machine.num_cores * (machine.clock_hz or DEFAULT_CLOCK_HZ) * per_cycle


def device_of(machine: Machine, dtype: str) -> ComputeDevice:
    """What runs compute on there: its GPU where it has one, else its CPU, with the memory that is free now."""
    return machine.gpu or ComputeDevice(
        machine.cpu_model, machine.available_memory_bytes, peak_flops(machine, dtype), CPU_BANDWIDTH_BYTES_PER_SECOND,
        CPU_LOW_UTILISATION, CPU_HIGH_UTILISATION, "cpu",
    )  # fmt: skip


FORM_FACTORS = ("PCIe", "SXM")
"""Words that tell the versions of one chip apart, in a name of the table. A driver may say SXM4, or nothing."""


def gpu_like(name: str, memory_bytes: int) -> ComputeDevice:
    """The GPU that its driver calls `name`, with the figures of its row in the table; `memory_bytes` is what a process can have of it.

    Of the versions of a chip that the name does not tell apart the lower figures count, of a chip that is not in the table the
    lowest of all GPUs.
    """
    said = re.findall(r"[a-z0-9]+", name.lower())
    gpus = [device for device in REFERENCE_DEVICES if device.kind == "gpu"]

    def is_chip(device: ComputeDevice) -> bool:
        return all(word.lower() in said for word in device.name.split() if word not in FORM_FACTORS)

    def is_version(device: ComputeDevice) -> bool:
        return any(word.startswith(form.lower()) for form in FORM_FACTORS if form in device.name.split() for word in said)

    chips = [device for device in gpus if is_chip(device)]
    alike = [device for device in chips if is_version(device)] or chips or gpus
    return replace(
        alike[0], name=name, memory_bytes=memory_bytes, peak_flops=min(device.peak_flops for device in alike),
        bandwidth_bytes_per_second=min(device.bandwidth_bytes_per_second for device in alike),
    )  # fmt: skip


def parse_cpuinfo(text: str) -> tuple[str, frozenset[str], float | None]:
    """Model name, noted features and clock (Hz) of the first processor in the text of /proc/cpuinfo."""
    first: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            first.setdefault(key.strip().lower(), value.strip())
    flags = frozenset((first.get("flags") or first.get("features") or "").split()) & frozenset(NOTED_FLAGS)
    clock = float(first["cpu mhz"]) * 1e6 if "cpu mhz" in first else None
    return first.get("model name", ""), flags, clock


def parse_meminfo(text: str) -> dict[str, int]:
    """The rows of /proc/meminfo in bytes."""
    rows = (line.split() for line in text.splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3 and row[2] == "kB"}


def cgroup_memory(proc: Path, cgroup: Path) -> tuple[int | None, int]:
    """The tightest memory limit of this process's control groups (versions 1 and 2), and what is free within it.

    The page cache that the kernel would give back counts as free. Without any limit: (None, 0).
    """
    found: list[tuple[int, int]] = []
    for folder in _cgroup_folders(proc, cgroup, "memory"):
        for limit_name, usage_name in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            limit = _number(folder / limit_name)
            if limit is None or limit >= NO_LIMIT_BYTES:
                continue
            used = (_number(folder / usage_name) or 0) - _reclaimable_bytes(folder)
            found.append((limit, max(0, limit - max(0, used))))
    if not found:
        return None, 0
    return min(limit for limit, _ in found), min(free for _, free in found)


def _num_cores(proc: Path, cgroup: Path) -> int:
    """Processors that this process may use: its affinity, or the control group's share where that is smaller."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _cgroup_folders(proc, cgroup, "cpu"):
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        words = _read(folder / "cpu.max").split()
        if len(words) == 2 and words[0] != "max":
            quota, period = int(words[0]), int(words[1])
        if quota and period and quota > 0:
            cores = min(cores, max(1, quota // period))
    return cores


def _cgroup_folders(proc: Path, cgroup: Path, controller: str) -> list[Path]:
    """Folders of this process's group and of all groups above it, for one controller, in both versions' layouts."""
    folders: list[Path] = []
    for line in _read(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        roots = (cgroup / controllers, cgroup / controller) if controllers else (cgroup, cgroup / "unified")
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for root in roots:
            # Inside a container the path may be the host's: then only the root exists, and it is the container's own.
            candidates = [root.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
            folders.extend(folder for folder in candidates if folder.is_dir() and folder not in folders)
    return folders


def _physical_memory(proc: Path) -> tuple[int | None, int | None]:
    memory: Mapping[str, int] = parse_meminfo(_read(proc / "meminfo"))
    total, available = memory.get("MemTotal"), memory.get("MemAvailable", memory.get("MemFree"))
    return (
        total if total is not None else _sysconf_bytes("SC_PHYS_PAGES"),
        available if available is not None else _sysconf_bytes("SC_AVPHYS_PAGES"),
    )


def _sysconf_bytes(name: str) -> int | None:
    if not hasattr(os, "sysconf") or name not in os.sysconf_names:
        return None
    pages = os.sysconf(name)
    return pages * os.sysconf("SC_PAGE_SIZE") if pages > 0 else None


def _reclaimable_bytes(folder: Path) -> int:
    # Version 1 counts a group's children under "total_"; version 2 always does.
    rows = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
    return int(rows.get("total_inactive_file") or rows.get("inactive_file") or 0)


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _read(path: Path) -> str:
    """The text of a system file; empty where the system has no such file or does not show it."""
    try:
        return path.read_text()
    except OSError:
        return ""
