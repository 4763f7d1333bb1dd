"""Fifty training steps against a plain transformers and torch.optim loop on the same rows, one row at a time; and against
figures recorded once (tests/golden/trajectory.json; `GIONG_GOLDEN=write pytest tests/parity/test_trajectory.py` records anew)."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parity.tolerances import PLANTED_FACTOR, allowed
from peft import LoraConfig, get_peft_model
from test_packing import rows_of

from giong.config import MethodConfig
from giong.contracts import Event, LossSum
from giong.engine.loop import train
from giong.engine.loop_config import LoopConfig
from giong.engine.packing import plan_steps
from giong.engine.step import Objective
from giong.methods import METHODS
from giong.models.rows import Row
from giong.objectives import sft

NUM_STEPS, BATCH_ROWS = 50, 4
GOLDEN = Path(__file__).parents[1] / "golden" / "trajectory.json"
LENGTHS = (5, 33, 17, 2, 26, 9, 40, 12, 21, 7)
CONFIG = LoopConfig(
    learning_rate=math.nan, num_epochs=50 / 3, batch_rows=BATCH_ROWS, max_tokens_per_pack=50, warmup_share=0.1, schedule="cosine",
    optimizer="adamw", weight_decay=0.1, max_grad_norm=1.0, seed=5, save_seconds=1e9, save_steps=None, keep_checkpoints=1,
)  # fmt: skip
LEARNING_RATES = {"lora": 3e-3, "full": 1e-3}
"""At 3e-3 all weights learn the ten rows by heart, and rounding is amplified until no two loops agree."""

LORA = MethodConfig(name="lora", lora_r=4, lora_alpha=8.0, lora_dropout=0.0)


class Enough(Exception):
    """The steps that were wanted are done."""


def trajectory_of_giong(  # type: ignore[no-untyped-def]
    loaded, method: str, rows: list[Row], folder: Path, *, dtype: torch.dtype = torch.float32, config: LoopConfig = CONFIG,
    objective: Objective = sft.loss, num_steps: int = NUM_STEPS,
) -> list[tuple[float, float]]:  # fmt: skip
    """Loss and gradient norm of every step, or of the first of them."""
    loaded.model.to(dtype)
    trainable = METHODS[method].apply(loaded.model, LORA if method == "lora" else MethodConfig(name="full"), seed=1)
    figures: list[tuple[float, float]] = []

    def emit(event: Event) -> None:
        if event.kind == "step":
            figures.append((event.data["loss"], event.data["grad_norm"]))
            if len(figures) == num_steps < NUM_STEPS:
                raise Enough

    with suppress(Enough):
        train(
            trainable.model, trainable.parameters, rows, objective, replace(config, learning_rate=LEARNING_RATES[method]),
            checkpoints=folder, emit=emit,
        )  # fmt: skip
    assert len(figures) == num_steps
    return figures


def trajectory_by_hand(  # type: ignore[no-untyped-def]
    loaded, method: str, rows: list[Row], planted: str | None = None, dtype: torch.dtype = torch.float32
) -> list[tuple[float, float]]:
    """The loop that anyone would write: rows unpacked, the sum of losses divided by the tokens of the batch, AdamW on fp32 copies."""
    model = loaded.model.to(dtype)
    if method == "lora":
        torch.manual_seed(1)
        model = get_peft_model(
            model,
            LoraConfig(r=4, lora_alpha=8.0, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"),
            autocast_adapter_dtype=False,
        )
    else:
        model.requires_grad_(True)
    computing = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parameters = [torch.nn.Parameter(parameter.detach().to(torch.float32, copy=True)) for parameter in computing]
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
            losses = torch.nn.functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1].float(), ids[1:], reduction="none")
            row_loss = (losses * weights[1:]).sum()
            loss_sum = loss_sum + (row_loss * total_weight / (len(batch) * weights.sum()) if planted == "mean of means" else row_loss)
        (loss_sum / total_weight).backward()
        for master, parameter in zip(parameters, computing):
            master.grad, parameter.grad = parameter.grad.float(), None
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, CONFIG.max_grad_norm))
        progress = (step - 5) / 45
        factor = (step + 1) / 6 if step < 5 else 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATES[method] * (1.0 if planted == "no schedule" else factor)
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(parameters, computing):
                parameter.copy_(master)
        figures.append((float(loss_sum.detach()) / total_weight, norm))
    return figures


def three_percent_off(tensors: dict[str, torch.Tensor]) -> LossSum:
    """The smallest error of scale that a trajectory has to show."""
    made = sft.loss(tensors)
    return replace(made, loss_sum=1.03 * made.loss_sum)


def differences(left: list[tuple[float, float]], right: list[tuple[float, float]]) -> tuple[float, float]:
    """Largest difference of losses (nats) and of gradient norms (relative), over the steps of the shorter one."""
    return (
        max(abs(a - b) for (a, _), (b, _) in zip(left, right)),
        max(abs(a - b) / b for (_, a), (_, b) in zip(left, right)),
    )


def mean_difference(left: list[tuple[float, float]], right: list[tuple[float, float]]) -> float:
    """Of losses, nats."""
    return sum(abs(a - b) for (a, _), (b, _) in zip(left, right, strict=True)) / NUM_STEPS


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_fifty_steps_equal_a_plain_loop(tiny_model: Callable, tmp_path: Path, family: str, method: str):
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


@pytest.mark.parametrize("method", ["lora", "full"])
def test_fifty_steps_in_bf16_stay_by_a_plain_loop_in_bf16(tiny_model: Callable, tmp_path: Path, method: str):
    rows = rows_of(LENGTHS)
    ours = trajectory_of_giong(tiny_model("llama"), method, rows, tmp_path, dtype=torch.bfloat16)
    by_hand = trajectory_by_hand(tiny_model("llama"), method, rows, dtype=torch.bfloat16)
    assert mean_difference(ours, by_hand) < allowed("trajectory_loss_bf16")
    planted = trajectory_by_hand(tiny_model("llama"), method, rows, "no schedule", torch.bfloat16)
    assert mean_difference(ours, planted) > PLANTED_FACTOR / 2 * allowed("trajectory_loss_bf16")


def test_the_recorded_trajectories_are_followed(tiny_model: Callable, tmp_path: Path):
    """What a change of the engine, of torch or of transformers does to the numbers shows here first."""
    rows = rows_of(LENGTHS)
    found = {
        f"{family}-{method}": trajectory_of_giong(tiny_model(family), method, rows, tmp_path / family / method)
        for family in ("llama", "qwen2", "gemma2", "gpt2")
        for method in ("lora", "full")
    }
    if os.environ.get("GIONG_GOLDEN") == "write":
        import transformers

        environment = {"torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.machine(),
                       "cpu_capability": torch.backends.cpu.get_cpu_capability()}  # fmt: skip
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps({"environment": environment, "loss_and_grad_norm": found}) + "\n", encoding="utf-8")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    for name, figures in golden["loss_and_grad_norm"].items():
        loss, norm = differences(found[name], figures)
        assert loss < allowed("trajectory_loss"), (name, golden["environment"])
        assert norm < allowed("trajectory_grad_norm"), (name, golden["environment"])
    loss, _ = differences(found["llama-lora"], golden["loss_and_grad_norm"]["llama-full"])
    assert loss > PLANTED_FACTOR * allowed("trajectory_loss")
