"""Which number formats the probe of this machine's speed tries."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_writing
import torch

from giong.config import ModelConfig
from giong.models import devices
from giong.project import init
from giong.workflow import Story, probing

GIGABYTE = 10**9


@pytest.mark.parametrize(
    ("free_bytes", "tried", "told"),
    [(16 * GIGABYTE, ["bfloat16", "float32"], []), (12 * GIGABYTE, ["bfloat16"], ["float32 is not tried: the weights take "])],
)
def test_a_format_whose_weights_do_not_fit_is_not_tried(
    monkeypatch: pytest.MonkeyPatch, free_bytes: int, tried: list[str], told: list[str]
) -> None:
    """A model of 3e9 weights; a tenth of the memory has to stay free. fp32 would be the faster one."""
    machine = replace(devices.this_machine(), available_memory_bytes=free_bytes)
    loaded: list[torch.dtype] = []

    def load(config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> SimpleNamespace:
        loaded.append(dtype)
        return SimpleNamespace(dtype=dtype, model=SimpleNamespace(num_parameters=lambda: 3 * GIGABYTE))

    monkeypatch.setattr(probing, "machine_of", lambda device: machine)
    monkeypatch.setattr(probing, "load_model", load)
    monkeypatch.setattr(probing, "training_speed", lambda model: 20.0 if model.dtype == torch.float32 else 10.0)
    monkeypatch.setattr(probing, "writing_speed", lambda model: 5.0)
    notices: list[str] = []
    story = SimpleNamespace(
        config=SimpleNamespace(model=ModelConfig()), check_stop=lambda: None, notice=lambda step, message: notices.append(message)
    )
    result = probing._measure(story, torch.device("cpu"))
    assert [str(dtype).removeprefix("torch.") for dtype in loaded] == tried == list(result["tokens_per_second"])
    assert result["dtype"] == tried[-1]
    assert [notice[: len(text)] for notice, text in zip(notices, told, strict=True)] == told


def test_force_measures_once_and_other_threads_keep_the_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def measure(story: object, device: torch.device, dtype: str | None = None) -> dict[str, Any]:
        asked.append(dtype)
        # The formats are as fast as each other: now one is ahead, now the other.
        found = dtype or ("float32", "bfloat16")[len(asked) % 2]
        return {
            "dtype": found,
            "tokens_per_second": {found: 1.0},
            "write_tokens_per_second": 1.0,
            "machine": probing.machine_identity(device),
        }

    monkeypatch.setattr(probing, "_measure", measure)
    project = init(tmp_path / "voice", sources=[small_writing.write_author(tmp_path / "writing")], settings={"model": {"device": "cpu"}})
    first = Story(project, force=True)
    found = [probing.probe(first)["dtype"] for _ in range(3)]
    assert asked == [None] and len(set(found)) == 1
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert probing.probe(Story(project))["dtype"] == found[0]
    assert asked == [None, found[0]]
    probing.probe(Story(project, force=True))
    assert asked == [None, found[0], None], "who forces it asks anew"


def test_passes_side_by_side_are_timed_and_leave_nothing_behind(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_model("llama")
    loaded.model.requires_grad_(False)
    monkeypatch.setattr(probing, "PROBE_TOKENS", 24)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        started = time.perf_counter()
        speedup = probing.speedup_of_lanes(loaded, 10.0, repeats=1)
        seconds = time.perf_counter() - started
        # 48 tokens in less than it took to do so twice.
        assert speedup > 48 / seconds / 10.0
        assert not any(parameter.requires_grad or parameter.grad is not None for parameter in loaded.model.parameters())
        torch.set_num_threads(1)
        assert probing.speedup_of_lanes(loaded, 10.0) == 1.0
    finally:
        torch.set_num_threads(before)
