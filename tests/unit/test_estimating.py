"""What a run is estimated by: the device that it will compute on, who shares it, and what its settings change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from giong.config import MethodConfig, ProjectConfig, parse
from giong.contracts import ModelShape
from giong.models.rows import RowReport
from giong.sizing.estimate import Estimate
from giong.sizing.hardware import Machine, gpu_like
from giong.sizing.memory import training_memory
from giong.sizing.shapes import num_trainable_parameters, shape_from_config
from giong.workflow import estimating, sizing

SHAPE = shape_from_config({
    "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True,
})  # fmt: skip
LORA = {"name": "lora", "lora_r": 16, "lora_alpha": 32.0, "lora_dropout": 0.0}
REPORT = RowReport(num_rows=80, num_tokens=80 * 500, num_loss_tokens=80 * 250)
HOST = Machine(8, "a CPU", frozenset({"avx2"}), 2.5e9, 64 * 10**9, 60 * 10**9, None, 10**12)


def story_of(config: ProjectConfig, folder: Path, shape: ModelShape = SHAPE) -> Any:
    """What an estimate asks of a story."""
    return SimpleNamespace(
        config=config, processes=None, project=SimpleNamespace(root=folder, list_runs=lambda: sorted(folder.glob("rows-*"))),
        local=SimpleNamespace(loaded=SimpleNamespace(shape=shape)),
    )  # fmt: skip


def run_of(config: ProjectConfig) -> Any:
    train = config.train.model_copy(update={"num_epochs": config.train.num_epochs or 1.0, "learning_rate": 1e-4})
    settings = {"method": config.method.record(), "train": train.model_dump(), "dtype": "bfloat16"}
    return SimpleNamespace(record={"settings": settings, "reasons": {}, "model_identity": "a model", "machine": {"cpu": "a CPU"}})


@pytest.fixture(autouse=True)
def probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the probe had measured 1,000 tokens a second on a CPU."""
    monkeypatch.setattr(estimating, "probe", lambda story: {"dtype": "bfloat16", "train_tokens_per_second": 1000.0})
    monkeypatch.setattr(estimating, "machine_of", lambda device: HOST)


def estimated(folder: Path, **settings: Any) -> Estimate:
    config = parse({"model": {"device": "cpu"}, "method": LORA, **settings})
    return estimating.estimate_run(story_of(config, folder), run_of(config), REPORT)


def test_the_device_of_the_settings_is_the_one_that_is_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def machine_of(device: object) -> Machine:
        asked.append(device)
        return replace(HOST, gpu=gpu_like("NVIDIA H200", 140 * 10**9))

    on_cpu = estimated(tmp_path)
    monkeypatch.setattr(estimating, "resolve_device", lambda setting: f"what {setting} stands for")
    monkeypatch.setattr(estimating, "machine_of", machine_of)
    config = parse({"model": {"device": "cuda"}, "method": LORA})
    story, run = story_of(config, tmp_path), run_of(config)
    on_gpu = estimating.estimate_run(story, run, REPORT)
    num_lora = num_trainable_parameters(SHAPE, MethodConfig(**LORA))
    assert on_gpu.peak_memory_bytes == training_memory(SHAPE, MethodConfig(**LORA), num_lora, 2048, "bfloat16", device="gpu").total_bytes
    assert on_gpu.peak_memory_bytes != on_cpu.peak_memory_bytes
    rows = sizing.backends(story, run, REPORT)
    assert (rows[0]["peak_memory_bytes"], rows[0]["fits"]) == (on_gpu.peak_memory_bytes, True)
    assert asked == ["what cuda stands for"] * 2
