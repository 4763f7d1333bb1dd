"""The optimizer over fp32 masters: against torch's own, on bf16 models, and through a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import ENCODERS, save_encoder, save_model

from giong.config import ModelConfig, parse
from giong.engine.optimizer import MasterOptimizer, learning_rate_at, not_for_muon
from giong.models.load import shape_of
from giong.models.row_model import RowModel, label_settings, load_row_model
from giong.models.rows import Row
from giong.objectives import classify
from giong.sizing.defaults import resolve_training
from giong.workflow import row_training

SETTINGS = {"optimizer": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1}


def small_model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3)).to(dtype)


def loss_of(model: torch.nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    inputs, targets = torch.randn(6, 5, generator=generator).to(dtype), torch.randn(6, 3, generator=generator).to(dtype)
    return (model(inputs) - targets).square().mean()


def test_ten_steps_equal_torch_adamw_on_fp32():
    """Matrices are decayed, gains and biases are not; gradients are clipped to norm 0.5."""
    ours, theirs = small_model(), small_model()
    optimizer = MasterOptimizer(dict(ours.named_parameters()), **SETTINGS)
    matrices = [parameter for parameter in theirs.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in theirs.parameters() if parameter.ndim == 1]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8
    )
    for step in range(10):
        learning_rate = 1e-2 * (step + 1) / 10
        loss_of(ours, step).backward()
        norm = optimizer.step(learning_rate, 0.5)
        reference.zero_grad()
        loss_of(theirs, step).backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in reference.param_groups:
            group["lr"] = learning_rate
        reference.step()
        assert norm == pytest.approx(float(expected_norm), rel=1e-5)
        for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_several_passes_add_up_and_are_cleared(dtype: torch.dtype):
    model = small_model(dtype)
    optimizer = MasterOptimizer(dict(model.named_parameters()), **SETTINGS)
    loss_of(model, 0).backward()
    once = optimizer.gradient_norm()
    loss_of(model, 0).backward()
    assert optimizer.gradient_norm() == pytest.approx(2 * once, rel=1e-6)
    for name, parameter in model.named_parameters():
        # In fp32 there is one weight and one gradient; in bf16 the gradient has moved on.
        assert (optimizer.masters[name] is parameter) == (dtype == torch.float32) == (parameter.grad is not None)
    optimizer.step(1e-3, 1.0)
    assert optimizer.gradient_norm() == 0
    optimizer.close()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_bf16_model_accumulates_in_fp32():
    """Adding 1 to 256 is lost in bf16 (8 bits); the master keeps every addend."""
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = MasterOptimizer({"p": parameter}, **SETTINGS)
    (256 * parameter).sum().backward()
    for _ in range(10):
        parameter.sum().backward()
    assert optimizer.masters["p"].grad.item() == 266.0


def test_steps_smaller_than_bf16_are_not_lost():
    """A bf16 weight of 1 cannot move by 1e-4 (its neighbours are 2^-8 below and 2^-7 above); 100 such steps must move it."""
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = MasterOptimizer({"p": parameter}, optimizer="adamw", learning_rate=1e-4, weight_decay=0.0)
    for _ in range(100):
        parameter.sum().backward()
        optimizer.step(1e-4, 1e9)
    # AdamW with a constant gradient moves by the learning rate each step.
    assert optimizer.masters["p"].item() == pytest.approx(0.99, abs=1e-4)
    assert parameter.item() == pytest.approx(0.99, abs=2**-8)
    assert parameter.item() != 1.0


def test_clipping_scales_the_gradient_but_reports_its_norm():
    """Gradient (3, 4) has norm 5; with plain AdamW the size does not matter, so the first moment is looked at."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = MasterOptimizer({"p": parameter}, **SETTINGS)
    (parameter * torch.tensor([3.0, 4.0])).sum().backward()
    assert optimizer.step(1e-3, 1.0) == pytest.approx(5.0)
    moment = optimizer.state_tensors()["adamw/exp_avg/p"]
    torch.testing.assert_close(moment, 0.1 * torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_moves_nothing(bad: float):
    model = small_model()
    optimizer = MasterOptimizer(dict(model.named_parameters()), **SETTINGS)
    loss_of(model, 0).backward()
    optimizer.step(1e-2, 1.0)
    before = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    (loss_of(model, 1) * bad).backward()
    assert not math.isfinite(optimizer.step(1e-2, 1.0))
    after = optimizer.state_tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)
    loss_of(model, 2).backward()
    assert math.isfinite(optimizer.step(1e-2, 1.0))


def test_muon_lowers_a_quadratic_and_leaves_vectors_and_excluded_matrices_to_adamw():
    torch.manual_seed(0)
    target = torch.randn(8, 6)
    parameters = {
        "matrix": torch.nn.Parameter(torch.zeros(8, 6)),
        "embedding": torch.nn.Parameter(torch.zeros(8, 6)),
        "gain": torch.nn.Parameter(torch.zeros(6)),
    }
    optimizer = MasterOptimizer(parameters, optimizer="muon", learning_rate=0.05, weight_decay=0.0, muon_excluded=frozenset({"embedding"}))

    def loss() -> torch.Tensor:
        return (
            (parameters["matrix"] - target).square().sum()
            + (parameters["embedding"] - target).square().sum()
            + (parameters["gain"] - 1).square().sum()
        )

    first = float(loss().detach())
    for _ in range(60):
        loss().backward()
        optimizer.step(0.05, 1e9)
    assert float(loss().detach()) < 0.2 * first
    names = set(optimizer.state_tensors())
    assert "muon/momentum_buffer/matrix" in names
    assert {"adamw/exp_avg/embedding", "adamw/exp_avg/gain"} <= names
    assert not any(name.startswith("muon/") and name.endswith(("embedding", "gain")) for name in names)


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("gpt2", {}, {"transformer.wte.weight", "transformer.wpe.weight"}),
        ("llama", {"tie_word_embeddings": False}, {"model.embed_tokens.weight", "lm_head.weight"}),
    ],
)
def test_embeddings_and_heads_are_not_for_muon_whatever_they_are_called(
    tiny_model: Callable, family: str, changes: dict, expected: set[str]
):
    model = tiny_model(family, **changes).model
    parameters = dict(model.named_parameters())
    assert not_for_muon(model, parameters) == expected
    optimizer = MasterOptimizer(parameters, **SETTINGS | {"optimizer": "muon"}, muon_excluded=not_for_muon(model, parameters))
    by_muon = {id(master) for group in optimizer.parts["muon"].param_groups for master in group["params"]}
    hidden = {id(parameter) for name, parameter in parameters.items() if parameter.ndim == 2 and name not in expected}
    assert by_muon == hidden
    assert hidden


@pytest.fixture
def classifier(request: pytest.FixtureRequest, tmp_path: Path) -> RowModel:
    save = save_encoder if request.param in ENCODERS else save_model
    base = ModelConfig(name_or_path=str(save(request.param, tmp_path / "base")))
    return load_row_model(base, label_settings(["a", "b"], "single_label"), dtype=torch.float32)


OF_CLASSIFIERS = {
    "bert": {
        "bert.embeddings.word_embeddings.weight", "bert.embeddings.position_embeddings.weight", "bert.embeddings.token_type_embeddings.weight",
        "bert.pooler.dense.weight", "classifier.weight",
    },
    "llama": {"model.embed_tokens.weight", "score.weight"},
}  # fmt: skip


@pytest.mark.parametrize(("classifier", "family"), [(family, family) for family in OF_CLASSIFIERS], indirect=["classifier"])
def test_a_classifiers_training_tells_muon_what_to_leave(
    classifier: RowModel, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    told = {}

    class TrainedError(Exception):
        """Ends the run where it would begin to compute."""

    def stand_in(model: torch.nn.Module, parameters: dict[str, torch.nn.Parameter], *given: object, **how: Any) -> None:
        told["names"] = {name for name in how["muon_excluded"] if parameters[name].ndim == 2}
        raise TrainedError

    monkeypatch.setattr("giong.workflow.row_training.train", stand_in)
    config = parse({"method": {"name": "full"}, "train": {"optimizer": "muon"}})
    said = lambda *given: None  # noqa: E731
    story = SimpleNamespace(config=config, processes=None, notice=said, emit=said, check_stop=said, should_stop=lambda: False)
    rows = [Row(np.arange(3, 12), np.zeros(9, dtype=np.float32), target=np.array([0.0], dtype=np.float32))]
    resolved = resolve_training(config.method, config.train, shape_of(classifier.model), len(rows))
    with pytest.raises(TrainedError):
        row_training._train(
            story, classifier, rows, lambda loaded, side: rows, classify.loss, resolved, tmp_path, tmp_path / "weights", couples_rows=False,
            corrupt=None, compiled=False,
        )  # fmt: skip
    assert told["names"] == OF_CLASSIFIERS[family]


def test_the_first_muon_update_is_orthogonal():
    """All singular values of the update are near one common value, whatever those of the gradient."""
    parameter = torch.nn.Parameter(torch.zeros(6, 6))
    optimizer = MasterOptimizer({"w": parameter}, optimizer="muon", learning_rate=1.0, weight_decay=0.0)
    torch.manual_seed(0)
    gradient = torch.randn(6, 6)
    assert torch.linalg.cond(gradient) > 5
    (parameter * gradient).sum().backward()
    optimizer.step(1.0, 1e9)
    values = torch.linalg.svdvals(parameter.detach())
    # Five Newton-Schulz iterations bring singular values into about 0.7 .. 1.2 of each other.
    assert values.max() / values.min() < 2.5


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_comes_back_to_the_same_bytes(kind: str):
    def fresh() -> tuple[torch.nn.Module, MasterOptimizer]:
        model = small_model(torch.bfloat16)
        return model, MasterOptimizer(dict(model.named_parameters()), optimizer=kind, learning_rate=1e-2, weight_decay=0.1)

    def run(model: torch.nn.Module, optimizer: MasterOptimizer, steps: range) -> None:
        for step in steps:
            loss_of(model, step).backward()
            optimizer.step(1e-2, 1.0)

    model, optimizer = fresh()
    run(model, optimizer, range(4))
    kept = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    run(model, optimizer, range(4, 9))
    resumed_model, resumed = fresh()
    resumed.load_state_tensors(kept)
    again = resumed.state_tensors()
    assert set(again) == set(kept)
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    run(resumed_model, resumed, range(4, 9))
    final, final_resumed = optimizer.state_tensors(), resumed.state_tensors()
    assert all(torch.equal(final[name], final_resumed[name]) for name in final)
    assert all(torch.equal(left, right) for left, right in zip(model.parameters(), resumed_model.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_from_a_file_goes_where_the_masters_are(kind: str, dtype: torch.dtype):
    """A checkpoint is read onto the CPU; torch's fused AdamW takes no tensor, not even the count of steps, from another device."""
    settings = SETTINGS | {"optimizer": kind}
    model = small_model(dtype)
    optimizer = MasterOptimizer(dict(model.named_parameters()), **settings)
    loss_of(model, 0).backward()
    optimizer.step(1e-2, 1.0)
    kept = optimizer.state_tensors()
    resumed = MasterOptimizer(dict(small_model(dtype).to("meta").named_parameters()), **settings)
    resumed.load_state_tensors(kept)
    found = resumed.state_tensors()
    assert set(found) == set(kept)
    assert {name for name in found if "/step/" in name}
    assert [name for name, tensor in found.items() if tensor.device.type != "meta"] == []
    assert all(tensor.device.type == "cpu" for tensor in kept.values())


def test_state_of_other_parameters_is_refused():
    model = small_model()
    optimizer = MasterOptimizer(dict(model.named_parameters()), **SETTINGS)
    with pytest.raises(KeyError, match="master/0.weight"):
        optimizer.load_state_tensors({"master/other": torch.zeros(1)})


def test_closed_hooks_leave_gradients_alone():
    model = small_model(torch.bfloat16)
    optimizer = MasterOptimizer(dict(model.named_parameters()), **SETTINGS)
    optimizer.close()
    loss_of(model, 0).backward()
    assert optimizer.gradient_norm() == 0
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # 10 steps, a fifth of them warm-up: 1/3 and 2/3 of the peak, then 8 steps fall from progress 0 to 7/8.
        ("constant", {0: 1 / 3, 1: 2 / 3, 2: 1.0, 9: 1.0}),
        ("linear", {0: 1 / 3, 1: 2 / 3, 2: 1.0, 6: 0.5, 9: 1 / 8}),
        (
            "cosine",
            {0: 1 / 3, 1: 2 / 3, 2: 1.0, 4: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 6: 0.55, 9: 0.1 + 0.45 * (1 + math.cos(7 * math.pi / 8))},
        ),
    ],
)
def test_learning_rate_by_hand(schedule: str, expected: dict[int, float]):
    for step, share in expected.items():
        assert learning_rate_at(step, 10, peak=3e-4, warmup_share=0.2, schedule=schedule) == pytest.approx(3e-4 * share, rel=1e-9)


def test_learning_rate_without_warm_up_starts_at_the_peak():
    assert learning_rate_at(0, 5, peak=1.0, warmup_share=0.0, schedule="cosine") == 1.0
    assert learning_rate_at(0, 1, peak=1.0, warmup_share=0.1, schedule="linear") == 1.0
