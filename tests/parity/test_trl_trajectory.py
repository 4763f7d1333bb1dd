"""Fifty training steps against TRL's SFTTrainer on the same weights and rows, as it was recorded (`trl_oracle.py`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trl_oracle as oracle
from parity.tolerances import PLANTED_FACTOR, allowed
from test_laws import PLANTED
from test_trajectory import CONFIG, LEARNING_RATES, LORA, NUM_STEPS, differences, planted_in_the_engine, trajectory_of_giong

from giong.models.rows import Row

GOLDEN = json.loads(oracle.TRAJECTORY.read_text(encoding="utf-8"))
SAME = replace(
    CONFIG, num_epochs=oracle.NUM_EPOCHS, batch_rows=oracle.BATCH_ROWS, warmup_share=0.0, schedule="linear",
    weight_decay=oracle.WEIGHT_DECAY, max_grad_norm=oracle.MAX_GRAD_NORM, seed=oracle.SHUFFLED_BY,
)  # fmt: skip


def apart(tiny_model: Callable, method: str, folder: Path, **changes: Any) -> tuple[float, float]:
    """Largest difference of losses (nats) and of gradient norms (relative)."""
    rows = [Row(ids, mask.astype(np.float32)) for ids, mask in oracle.rows_of_the_trajectory()]
    ours = trajectory_of_giong(tiny_model("llama"), method, rows, folder, config=SAME, **changes)
    return differences(ours, GOLDEN["loss_and_grad_norm"][method])


def test_the_settings_are_those_of_the_record():
    assert (NUM_STEPS, LEARNING_RATES) == (oracle.NUM_STEPS, oracle.LEARNING_RATES)
    assert {"r": LORA.lora_r, "lora_alpha": LORA.lora_alpha, "lora_dropout": LORA.lora_dropout} == {
        name: oracle.LORA[name] for name in ("r", "lora_alpha", "lora_dropout")
    }
    assert {"torch", "transformers", "peft", "trl", "threads"} <= GOLDEN["environment"].keys()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_fifty_steps_equal_trls(tiny_model: Callable, tmp_path: Path, method: str):
    loss, norm = apart(tiny_model, method, tmp_path)
    assert loss < allowed("trajectory_loss"), GOLDEN["environment"]
    assert norm < allowed("trajectory_grad_norm"), GOLDEN["environment"]
    losses = [loss for loss, _ in GOLDEN["loss_and_grad_norm"][method]]
    assert len(losses) == NUM_STEPS and losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("planted", [*PLANTED, "scale three percent off"])
def test_a_planted_error_is_seen_in_five_steps(tiny_model: Callable, tmp_path: Path, planted: str):
    with planted_in_the_engine(planted) as objective:
        loss, norm = apart(tiny_model, "lora", tmp_path, objective=objective, num_steps=5)
    assert loss > PLANTED_FACTOR * allowed("trajectory_loss")
    assert norm > PLANTED_FACTOR * allowed("trajectory_grad_norm")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_trl_still_takes_these_steps(tmp_path: Path, method: str):
    pytest.importorskip("trl", reason="benchmarks/peers.py says how TRL is installed")
    loss, norm = differences(oracle.trajectory(method, tmp_path), GOLDEN["loss_and_grad_norm"][method])
    assert loss < allowed("trajectory_loss"), GOLDEN["environment"]
    assert norm < allowed("trajectory_grad_norm"), GOLDEN["environment"]
