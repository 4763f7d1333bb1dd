"""Twenty training steps against a plain transformers and torch.optim loop on the same rows, one row at a time, fp32."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from parity.tolerances import PLANTED_FACTOR, allowed
from peft import LoraConfig, get_peft_model
from test_packing import rows_of

from giong.config import MethodConfig
from giong.contracts import Event
from giong.engine.loop import LoopConfig, train
from giong.engine.packing import plan_steps
from giong.methods import METHODS
from giong.models.rows import Row
from giong.objectives import sft

NUM_STEPS, BATCH_ROWS = 20, 4
LENGTHS = (5, 33, 17, 2, 26, 9, 40, 12, 21, 7)
CONFIG = LoopConfig(
    learning_rate=3e-3, num_epochs=20 / 3, batch_rows=BATCH_ROWS, max_tokens_per_pack=50, warmup_share=0.1, schedule="cosine",
    optimizer="adamw", weight_decay=0.1, max_grad_norm=1.0, seed=5, save_seconds=1e9, save_steps=None, keep_checkpoints=1,
)  # fmt: skip
LORA = MethodConfig(name="lora", lora_r=4, lora_alpha=8.0, lora_dropout=0.0)


def trajectory_of_giong(loaded, method: str, rows: list[Row], folder: Path) -> list[tuple[float, float]]:  # type: ignore[no-untyped-def]
    config = LORA if method == "lora" else MethodConfig(name="full")
    trainable = METHODS[method].apply(loaded.model, config, seed=1)
    events: list[Event] = []
    train(trainable.model, trainable.parameters, rows, sft.loss, CONFIG, checkpoints=folder, emit=events.append)
    return [(event.data["loss"], event.data["grad_norm"]) for event in events if event.kind == "step"]


def trajectory_by_hand(loaded, method: str, rows: list[Row], planted: str | None = None) -> list[tuple[float, float]]:  # type: ignore[no-untyped-def]
    """The loop that anyone would write: rows unpacked, the sum of losses divided by the tokens of the batch, AdamW."""
    model = loaded.model
    if method == "lora":
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8.0, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"))
    else:
        model.requires_grad_(True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": 0.0 if planted == "no decay" else 0.1},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999 if planted == "other betas" else 0.95), eps=1e-8)
    figures = []
    for step, members in enumerate(plan_steps(len(rows), BATCH_ROWS, CONFIG.num_epochs, CONFIG.seed)):
        batch = [rows[index] for index in members]
        total_weight = sum(float(row.weights.sum()) for row in batch)
        loss_sum = torch.zeros(())
        for row in batch:
            ids, weights = torch.from_numpy(row.input_ids), torch.from_numpy(row.weights)
            losses = torch.nn.functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
            row_loss = (losses * weights[1:]).sum()
            loss_sum = loss_sum + (row_loss * total_weight / (len(batch) * weights.sum()) if planted == "mean of means" else row_loss)
        (loss_sum / total_weight).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, CONFIG.max_grad_norm))
        progress = (step - 2) / 18
        factor = (step + 1) / 3 if step < 2 else 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = CONFIG.learning_rate * (1.0 if planted == "no schedule" else factor)
        optimizer.step()
        optimizer.zero_grad()
        figures.append((float(loss_sum.detach()) / total_weight, norm))
    return figures


def differences(left: list[tuple[float, float]], right: list[tuple[float, float]]) -> tuple[float, float]:
    """Largest difference of losses (nats) and of gradient norms (relative)."""
    assert len(left) == len(right) == NUM_STEPS
    return (
        max(abs(a - b) for (a, _), (b, _) in zip(left, right)),
        max(abs(a - b) / b for (_, a), (_, b) in zip(left, right)),
    )


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_twenty_steps_equal_a_plain_loop(tiny_model: Callable, tmp_path: Path, family: str, method: str):
    rows = rows_of(LENGTHS)
    ours = trajectory_of_giong(tiny_model(family), method, rows, tmp_path)
    by_hand = trajectory_by_hand(tiny_model(family), method, rows)
    loss, norm = differences(ours, by_hand)
    assert loss < allowed("trajectory_loss")
    assert norm < allowed("trajectory_grad_norm")
    assert by_hand[-1][0] < by_hand[0][0] - 0.1


@pytest.mark.parametrize("planted", ["mean of means", "no decay", "other betas", "no schedule"])
def test_a_planted_error_is_seen(tiny_model: Callable, tmp_path: Path, planted: str):
    rows = rows_of(LENGTHS)
    ours = trajectory_of_giong(tiny_model("llama"), "full", rows, tmp_path)
    loss, norm = differences(ours, trajectory_by_hand(tiny_model("llama"), "full", rows, planted))
    assert loss > PLANTED_FACTOR * allowed("trajectory_loss") or norm > PLANTED_FACTOR * allowed("trajectory_grad_norm")
