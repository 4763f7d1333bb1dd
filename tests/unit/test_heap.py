"""Holes in glibc's heap are handed back, now and then."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from giong.engine.heap import HeapTrimmer
from giong.jobs.supervisor import ALLOCATOR, worker_environment

HOLES = """
import torch
from giong.engine.heap import trim

def resident() -> int:
    return int(open("/proc/self/statm").read().split()[1]) * 4096

# Every second one stays: nothing at the end of the heap is free.
tensors = [torch.ones(200_000 + 1000 * index) for index in range(300)]
kept = tensors[1::2]
full = resident()
del tensors
left = resident()
trim()
print(full, left, resident(), float(sum(tensor.sum() for tensor in kept)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has malloc_trim")
def test_holes_go_back_to_the_system() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOLES], env=worker_environment() | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    full, left, trimmed, total = map(float, done.stdout.split())
    freed = 4 * sum(200_000 + 1000 * index for index in range(0, 300, 2))
    # Without it the heap keeps what was freed: that is what the workers' settings are for.
    assert full - left < 0.2 * freed
    assert full - trimmed > 0.8 * freed
    assert total == sum(200_000 + 1000 * index for index in range(1, 300, 2))


def test_it_is_done_once_a_minute() -> None:
    now = [0.0]
    trimmer = HeapTrimmer(60.0, lambda: now[0])
    done = []
    for now[0] in (10.0, 59.0, 60.0, 61.0, 119.0, 121.0):
        done.append(trimmer.after_step())
    assert done == [False, False, True, False, False, True]


def test_the_allocators_settings_reach_a_worker_and_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch):
    for name in ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    found = worker_environment()
    assert {name: found[name] for name in ALLOCATOR} == ALLOCATOR
    assert found["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    for name in ALLOCATOR:
        monkeypatch.setenv(name, "the user's")
    assert {worker_environment()[name] for name in ALLOCATOR} == {"the user's"}
