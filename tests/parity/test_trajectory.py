"""Fifty training steps against a plain transformers and torch.optim loop on the same rows, one row at a time; and against
figures recorded once (tests/golden/trajectory.json; `GIONG_GOLDEN=write pytest tests/parity/test_trajectory.py` records anew)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_environment import environment
from parity.tolerances import PLANTED_FACTOR, allowed
from peft import LoraConfig, get_peft_model
from test_laws import PLANTED, mean_of_the_pass, plant_in_packs
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

LEARNING_RATES_BF16 = {"lora": 1e-3, "full": 2e-4}
"""As above, of rounding that is 10^5 times as coarse."""

Figures = list[tuple[float, float]]
"""Loss and gradient norm of every step."""

LORA = MethodConfig(name="lora", lora_r=4, lora_alpha=8.0, lora_dropout=0.0)


def rates_of(dtype: torch.dtype) -> dict[str, float]:
    return LEARNING_RATES if dtype == torch.float32 else LEARNING_RATES_BF16


class Enough(Exception):
    """The steps that were wanted are done."""


def trajectory_of_giong(  # type: ignore[no-untyped-def]
    loaded, method: str, rows: list[Row], folder: Path, *, dtype: torch.dtype = torch.float32, config: LoopConfig = CONFIG,
    objective: Objective = sft.loss, num_steps: int = NUM_STEPS, rates: dict[str, float] | None = None,
) -> Figures:  # fmt: skip
    """Of all steps, or of the first of them."""
    loaded.model.to(dtype)
    trainable = METHODS[method].apply(loaded.model, LORA if method == "lora" else MethodConfig(name="full"), seed=1)
    figures: Figures = []

    def emit(event: Event) -> None:
        if event.kind == "step":
            figures.append((event.data["loss"], event.data["grad_norm"]))
            if len(figures) == num_steps < NUM_STEPS:
                raise Enough

    with suppress(Enough):
        train(
            trainable.model, trainable.parameters, rows, objective, replace(config, learning_rate=(rates or rates_of(dtype))[method]),
            checkpoints=folder, emit=emit,
        )  # fmt: skip
    assert len(figures) == num_steps
    return figures


def trajectory_by_hand(  # type: ignore[no-untyped-def]
    loaded, method: str, rows: list[Row], planted: str | None = None, dtype: torch.dtype = torch.float32, num_steps: int = NUM_STEPS
) -> Figures:
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
    for step, members in enumerate(plan_steps(len(rows), BATCH_ROWS, CONFIG.num_epochs, CONFIG.seed)[:num_steps]):
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
            group["lr"] = rates_of(dtype)[method] * (1.0 if planted == "no schedule" else factor)
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(parameters, computing):
                parameter.copy_(master)
        figures.append((float(loss_sum.detach()) / total_weight, norm))
    return figures


def three_percent_off(tensors: dict[str, torch.Tensor]) -> LossSum:
    """The smallest error of scale that fp32 has to show."""
    made = sft.loss(tensors)
    return replace(made, loss_sum=1.03 * made.loss_sum)


def gradient_half_again(tensors: dict[str, torch.Tensor]) -> LossSum:
    """The gradient is too large, and the loss is right."""
    made = sft.loss(tensors)
    return replace(made, loss_sum=1.5 * made.loss_sum - 0.5 * made.loss_sum.detach())


OBJECTIVES = {"wrong scale": mean_of_the_pass, "scale three percent off": three_percent_off, "gradient half again": gradient_half_again}

PLANTED_IN_BF16 = {
    "lora": ("rows see each other", "mask shifted", "gradient half again"),
    "full": ("row dropped", "wrong scale", "gradient half again"),
}


@contextmanager
def planted_in_the_engine(planted: str) -> Iterator[Objective]:
    """The objective to train with while every pack has this error; one of scale is the objective's own."""
    with pytest.MonkeyPatch.context() as patch:
        if planted not in OBJECTIVES:
            plant_in_packs(patch, planted)
        yield OBJECTIVES.get(planted, sft.loss)


def differences(left: Figures, right: Figures) -> tuple[float, float]:
    """Largest difference of losses (nats) and of gradient norms (relative), over the steps of the shorter one."""
    return (
        max(abs(a - b) for (a, _), (b, _) in zip(left, right)),
        max(abs(a - b) / b for (_, a), (_, b) in zip(left, right)),
    )


def mean_differences(left: Figures, right: Figures) -> tuple[float, float]:
    """Of losses (nats) and of gradient norms (relative), over the steps of the shorter one."""
    pairs = list(zip(left, right))
    return (
        sum(abs(a - b) for (a, _), (b, _) in pairs) / len(pairs),
        sum(abs(a - b) / b for (_, a), (_, b) in pairs) / len(pairs),
    )


def recorded(found: dict[str, Figures]) -> tuple[dict[str, Figures], dict[str, str | int]]:
    """What is on record under these names, and where it was recorded."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    if os.environ.get("GIONG_GOLDEN") == "write":
        golden = {"environment": environment(), "loss_and_grad_norm": golden["loss_and_grad_norm"] | found}
        GOLDEN.write_text(json.dumps(golden) + "\n", encoding="utf-8")
    return {name: golden["loss_and_grad_norm"][name] for name in found}, golden["environment"]


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


@pytest.fixture(scope="module")
def of_llama(tiny_model: Callable, tmp_path_factory: pytest.TempPathFactory) -> Figures:
    return trajectory_of_giong(tiny_model("llama"), "full", rows_of(LENGTHS), tmp_path_factory.mktemp("of_llama"))


@pytest.mark.parametrize("planted", ["mean of means", "no decay", "other betas", "no schedule"])
def test_an_error_planted_in_the_plain_loop_is_seen(tiny_model: Callable, of_llama: Figures, planted: str):
    loss, norm = differences(of_llama, trajectory_by_hand(tiny_model("llama"), "full", rows_of(LENGTHS), planted))
    assert loss > PLANTED_FACTOR * allowed("trajectory_loss") or norm > PLANTED_FACTOR * allowed("trajectory_grad_norm")


@pytest.mark.parametrize("planted", [*PLANTED, "scale three percent off"])
def test_an_error_planted_in_the_engine_is_seen_in_five_steps(tiny_model: Callable, tmp_path: Path, planted: str):
    rows = rows_of(LENGTHS)
    by_hand = trajectory_by_hand(tiny_model("llama"), "full", rows, num_steps=5)
    with planted_in_the_engine(planted) as objective:
        ours = trajectory_of_giong(tiny_model("llama"), "full", rows, tmp_path, objective=objective, num_steps=5)
    loss, norm = differences(ours, by_hand)
    assert loss > PLANTED_FACTOR * allowed("trajectory_loss")
    assert norm > PLANTED_FACTOR * allowed("trajectory_grad_norm")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_fifty_steps_in_bf16_stay_by_a_plain_loop_in_bf16_and_by_the_record(tiny_model: Callable, tmp_path: Path, method: str):
    rows, bf16 = rows_of(LENGTHS), torch.bfloat16
    ours = trajectory_of_giong(tiny_model("llama"), method, rows, tmp_path / "ours", dtype=bf16)
    by_hand = trajectory_by_hand(tiny_model("llama"), method, rows, dtype=bf16)
    name = f"llama-{method}-bf16"
    golden, where = recorded({name: ours})
    for expected in (by_hand, golden[name]):
        loss, norm = mean_differences(ours, expected)
        assert loss < allowed("trajectory_loss_bf16"), where
        assert norm < allowed("trajectory_grad_norm_bf16"), where
    for planted in PLANTED_IN_BF16[method]:
        with planted_in_the_engine(planted) as objective:
            folder = tmp_path / planted
            wrong = trajectory_of_giong(tiny_model("llama"), method, rows, folder, dtype=bf16, objective=objective, num_steps=20)
        loss, norm = mean_differences(wrong, by_hand)
        assert planted == "gradient half again" or loss > PLANTED_FACTOR * allowed("trajectory_loss_bf16"), planted
        assert planted not in OBJECTIVES or norm > PLANTED_FACTOR * allowed("trajectory_grad_norm_bf16"), planted


def test_the_recorded_trajectories_are_followed(tiny_model: Callable, tmp_path: Path):
    """What a change of the engine, of torch or of transformers does to the numbers shows here first."""
    rows = rows_of(LENGTHS)
    found = {
        f"{family}-{method}": trajectory_of_giong(tiny_model(family), method, rows, tmp_path / family / method)
        for family in ("llama", "qwen2", "gemma2", "gpt2")
        for method in ("lora", "full")
    }
    golden, where = recorded(found)
    for name, figures in golden.items():
        assert len(figures) == NUM_STEPS
        loss, norm = differences(found[name], figures)
        assert loss < allowed("trajectory_loss"), (name, where)
        assert norm < allowed("trajectory_grad_norm"), (name, where)
    with planted_in_the_engine("scale three percent off") as objective:
        wrong = trajectory_of_giong(tiny_model("llama"), "lora", rows, tmp_path / "wrong", objective=objective, num_steps=5)
    loss, norm = differences(wrong, golden["llama-lora"])
    assert loss > PLANTED_FACTOR * allowed("trajectory_loss")
    assert norm > PLANTED_FACTOR * allowed("trajectory_grad_norm")


def test_the_record_says_where_it_was_made():
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert golden["environment"].keys() == environment().keys()
