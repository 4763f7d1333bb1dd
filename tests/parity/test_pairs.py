"""Pairs through the engine: never parted, and the gradient of DPO equal to a plain transformers loop, however they are packed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity.test_packing import gradients, logprobs_one_by_one, relative_difference
from parity.tolerances import PLANTED_FACTOR, allowed
from tiny_models import VOCAB_SIZE

from giong.config import MethodConfig, ObjectiveConfig
from giong.contracts import Event
from giong.engine import distributed
from giong.engine.distributed import ALONE, Processes
from giong.engine.loop import train
from giong.engine.loop_config import LoopConfig
from giong.engine.memory import largest_pack
from giong.engine.packing import grouped
from giong.engine.step import backward, evaluate_objective
from giong.methods import METHODS
from giong.models.rows import Row
from giong.objectives import objective_of

OBJECTIVE = objective_of(ObjectiveConfig(name="dpo", beta=0.3))
LENGTHS = ((9, 14), (20, 6), (11, 12), (5, 30))


def pair_rows(lengths: tuple[tuple[int, int], ...] = LENGTHS, seed: int = 4) -> list[Row]:
    """Random answers of these lengths to random requests of four tokens, with a made-up reference."""
    generator = np.random.default_rng(seed)
    rows = []
    for number, pair in enumerate(lengths):
        request = generator.integers(0, VOCAB_SIZE, size=4)
        for sign, length in zip((1.0, -1.0), pair):
            weights = np.concatenate([np.zeros(4), np.ones(length)]).astype(np.float32)
            extras = {"sign_R": sign, "margin_R": 0.0, "reference_logprobs_N": -generator.gamma(4.0, size=length)}
            rows.append(
                Row(
                    np.concatenate([request, generator.integers(0, VOCAB_SIZE, size=length)]),
                    weights,
                    f"pair {number}",
                    group=number,
                    extras=extras,
                )
            )
    return rows


def dpo_by_hand(model: torch.nn.Module, rows: list[Row], planted: str = "") -> dict[str, torch.Tensor]:
    """Gradients of the mean of -log sigmoid(0.3 h) over pairs, one row at a time through transformers."""
    sums = [
        logprobs.sum() - float(row.extras["reference_logprobs_N"].sum()) for logprobs, row in zip(logprobs_one_by_one(model, rows), rows)
    ]
    losses = [-torch.nn.functional.logsigmoid(0.3 * (chosen - rejected)) for chosen, rejected in zip(sums[::2], sums[1::2])]
    divisor = sum(len(row.extras["reference_logprobs_N"]) for row in rows) if planted == "per token" else len(losses)
    (torch.stack(losses).sum() / divisor).backward()
    return gradients(model)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_gradient_of_all_weights_equals_a_plain_loop_however_pairs_are_packed(tiny_model: Callable, family: str):
    """The head is trained too, its weights known behind the forward pass alone."""
    model, rows = tiny_model(family).model.requires_grad_(True), pair_rows()
    expected = dpo_by_hand(model, rows)
    for order, max_tokens in ((rows, 10_000), (rows, 1), (rows[4:] + rows[:4], 60)):
        backward(model, order, OBJECTIVE, max_tokens)
        found = gradients(model)
        assert relative_difference(found, expected) < allowed("gradients")
    assert relative_difference(found, dpo_by_hand(model, rows, "per token")) > PLANTED_FACTOR * allowed("gradients")


def test_figures_do_not_hang_on_packs_and_pairs_are_the_unit(tiny_model: Callable):
    model, rows = tiny_model("llama").model, pair_rows()
    whole, apart = (evaluate_objective(model, rows, OBJECTIVE, max_tokens) for max_tokens in (10_000, 1))
    assert whole == pytest.approx(apart, abs=1e-4)
    assert whole["length_chosen"] == pytest.approx(np.mean([chosen for chosen, _ in LENGTHS]))


def test_a_pair_is_never_parted(monkeypatch: pytest.MonkeyPatch):
    """Neither over packs nor over processes: packs of 30 tokens hold no pair but the first, and each stays whole."""
    monkeypatch.setattr(distributed.dist, "new_group", lambda timeout: None)
    rows = pair_rows()
    assert [len(group) for group in grouped(rows)] == [2, 2, 2, 2]
    for processes in ([ALONE], [Processes(rank, ("a", "b")) for rank in range(2)]):
        for sharded in (False, True):
            made = []
            for one in processes:
                monkeypatch.setattr(one, "sharded", sharded and len(processes) > 1)
                made += one.passes(rows, 30)
            for members, _ in made:
                assert [row.extras["sign_R"] for row in members] == [1, -1] * (len(members) // 2)
            assert sorted(row.name for members, factor in made for row in members if factor) == sorted(row.name for row in rows)
    assert [row.name for row in largest_pack(rows, 60)] == ["pair 3"] * 2
    assert [row.name for row in largest_pack(rows, 90)] == ["pair 3"] * 2 + ["pair 1"] * 2


def test_a_run_learns_which_answer_is_preferred_and_resumes_to_the_same_bytes(tiny_model: Callable, tmp_path: Path):
    config = LoopConfig(
        learning_rate=2e-2, num_epochs=6, batch_rows=2, max_tokens_per_pack=40, warmup_share=0.1, schedule="constant", optimizer="adamw",
        weight_decay=0.0, max_grad_norm=1.0, seed=1, save_seconds=1e9, save_steps=None, keep_checkpoints=1,
    )  # fmt: skip
    lora = MethodConfig(name="lora", lora_r=4, lora_alpha=8.0, lora_dropout=0.1)

    def run(folder: Path, die_at: int | None = None) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        trainable = METHODS["lora"].apply(tiny_model("llama").model, lora, seed=2)
        steps: list[dict[str, Any]] = []

        def emit(event: Event) -> None:
            if event.kind == "step":
                steps.append(event.data)

        with pytest.raises(Exception, match="Stopped") if die_at else _nothing():
            train(
                trainable.model, trainable.parameters, pair_rows(), OBJECTIVE, config, checkpoints=folder, emit=emit,
                should_stop=lambda: bool(die_at) and len(steps) >= (die_at or 0),
            )  # fmt: skip
        return steps, {name: parameter.detach().clone() for name, parameter in trainable.parameters.items()}

    steps, whole = run(tmp_path / "whole")
    # Four pairs, two a step.
    assert len(steps) == 12
    assert steps[-1]["rewards_margin"] > steps[0]["rewards_margin"] + 1
    assert steps[-1]["rewards_accuracy"] == 1.0
    run(tmp_path / "stopped", die_at=5)
    _, resumed = run(tmp_path / "stopped")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def _nothing():  # type: ignore[no-untyped-def]
    from contextlib import nullcontext

    return nullcontext()
