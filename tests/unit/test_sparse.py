"""What is the method `sparse`'s own: which weights it takes, that nothing but they move, and what it holds for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from moving_parts import CASES
from parity.tolerances import PLANTED_FACTOR, allowed
from safetensors.torch import load_file, save_file
from test_methods import logits_of, take_steps
from tiny_models import FAMILIES

import giong.methods.sparse as sparse
from giong.config import MethodConfig, ModelConfig, TrainConfig
from giong.engine.anchor import Anchor
from giong.engine.optimizer import MasterOptimizer
from giong.engine.step import backward
from giong.errors import ConfigError, ModelError
from giong.models.parts import decoder_layers, matrices
from giong.models.rows import Row
from giong.models.trained import load_trained
from giong.objectives import sft
from giong.sizing.defaults import ResolvedTraining
from giong.workflow.choosing import INDICES_FILE, given_to_method
from giong.workspace import read_json

ROWS = [Row(np.arange(start, start + 20), np.r_[np.zeros(5), np.ones(15)].astype(np.float32)) for start in (5, 60, 200)]
SIMPLE = CASES["sparse"]


def matrices_of(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    wanted = {id(matrix.weight) for layer in decoder_layers(model) for matrix in matrices(layer).values()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in wanted}


def gradients_by_row(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of all matrices, one row after the other, by plain autograd: (rows, *matrix)."""
    found = matrices_of(model)
    by_row: dict[str, list[torch.Tensor]] = {name: [] for name in found}
    for matrix in found.values():
        matrix.requires_grad_(True)
    for row in ROWS:
        backward(model, [row], sft.loss, 64)
        for name, matrix in found.items():
            by_row[name].append(matrix.grad)
            matrix.grad = None
    model.requires_grad_(False)
    return {name: torch.stack(gradients) for name, gradients in by_row.items()}


def go_through(model: torch.nn.Module, calls: list[int]) -> Callable[[], None]:
    def go() -> None:
        calls.append(1)
        for row in ROWS:
            backward(model, [row], sft.loss, 64)

    return go


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("score", "of_gradients"), [
    ("fisher", lambda gradients: gradients.square().sum(0)), ("gradient", lambda gradients: gradients.sum(0).abs()),
])  # fmt: skip
def test_the_highest_scores_by_gradient_are_chosen(
    tiny_model: Callable, monkeypatch: pytest.MonkeyPatch, family: str, score: str, of_gradients: Callable
):
    model, calls = tiny_model(family).model, []
    config = SIMPLE.model_copy(update={"sparse_score": score})
    found = sparse.choose(model, config, go_through(model, calls))
    expected = {name: of_gradients(gradients).flatten() for name, gradients in gradients_by_row(tiny_model(family).model).items()}
    assert found.keys() == expected.keys() and len(calls) == 1
    for name, indices in found.items():
        count = max(1, round(0.02 * expected[name].numel()))
        assert indices.dtype == torch.int32 and torch.equal(indices, indices.unique()) and len(indices) == count
        assert expected[name][indices].min() >= expected[name].topk(count + 1).values[-1]
    # The other score would have chosen others, and so would one row less.
    other = sparse.choose(
        model, SIMPLE.model_copy(update={"sparse_score": "gradient" if score == "fisher" else "fisher"}), go_through(model, [])
    )
    assert any(not torch.equal(found[name], other[name]) for name in found)
    # Where not all scores fit into memory together, the rows are gone through again, and the choice is the same.
    monkeypatch.setattr(sparse, "SCORES_AT_ONCE", 9000)
    in_parts = sparse.choose(model, config, go_through(model, calls))
    assert len(calls) > 3 and all(torch.equal(found[name], in_parts[name]) for name in found)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


def test_the_largest_weights_or_any(tiny_model: Callable):
    model = tiny_model("llama").model
    by_size = sparse.choose(model, SIMPLE)
    for name, matrix in matrices_of(model).items():
        chosen = torch.zeros(matrix.numel(), dtype=torch.bool)
        chosen[by_size[name].long()] = True
        assert matrix.detach().abs().flatten()[chosen].min() >= matrix.detach().abs().flatten()[~chosen].max()
    drawn = SIMPLE.model_copy(update={"sparse_score": "random"})
    first, again, other = (sparse.choose(model, drawn, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in first)
    with pytest.raises(ValueError, match="needs rows"):
        sparse.choose(model, SIMPLE.model_copy(update={"sparse_score": "fisher"}))


def test_memory_that_runs_out_where_entries_are_taken_leaves_no_gradient(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    """It would be added to when the step is computed again."""
    model = tiny_model("llama").model
    trainable = sparse.apply(model, SIMPLE, indices=sparse.choose(model, SIMPLE))

    class Full:
        def __getitem__(self, places: object) -> torch.Tensor:
            raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "reshape", lambda tensor, *shape: Full())
        matrix = next(parameter for parameter in model.parameters() if parameter.requires_grad)
        matrix.grad = torch.ones_like(matrix)
        with pytest.raises(MemoryError):
            sparse._take_entries(next(iter(trainable.parameters.values())), torch.zeros(1, dtype=torch.int64), matrix)
    assert matrix.grad is None


def places_that_moved(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    moved = {name: (parameter.detach() != before[name]).flatten().nonzero().flatten().int() for name, parameter in model.named_parameters()}
    return {name: places for name, places in moved.items() if len(places)}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_chosen_weights_move_and_nothing_else(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch, family: str):
    true = sparse.put_entries
    for planted in (False, True):
        loaded = tiny_model(family)
        indices = sparse.choose(loaded.model, SIMPLE)
        before = {name: parameter.detach().clone() for name, parameter in loaded.model.named_parameters()}
        trainable = sparse.apply(loaded.model, SIMPLE, indices=indices)
        if planted:
            monkeypatch.setattr(sparse, "put_entries", lambda tensor, places, values: true(tensor, places - 1, values))
        take_steps(trainable)
        moved = places_that_moved(trainable.merge(), before)
        same = moved.keys() == indices.keys() and all(torch.equal(moved[name], indices[name]) for name in moved)
        assert same != planted


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_gradients_are_those_of_the_whole_matrices(tiny_model: Callable, family: str):
    model = tiny_model(family).model
    expected = {name: gradients.sum(0).flatten() for name, gradients in gradients_by_row(tiny_model(family).model).items()}
    trainable = sparse.apply(model, SIMPLE)
    indices = sparse.choose(model, SIMPLE)
    for row in ROWS:
        backward(model, [row], sft.loss, 64)

    def difference(shift: int) -> float:
        """Relative; with the entries beside the chosen ones as what is planted."""
        parts = [
            (values.grad - expected[name][indices[name] - shift]).norm() / expected[name].norm()
            for name, values in trainable.parameters.items()
        ]
        return float(max(parts))

    assert difference(0) < allowed("gradients")
    assert difference(1) > PLANTED_FACTOR * allowed("gradients")


def test_no_more_than_one_gradient_of_a_matrix_is_held(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    model, true = tiny_model("llama", dtype="bfloat16").model, sparse._take_entries
    found, held = matrices_of(model), []

    def counted(values: torch.nn.Parameter, places: torch.Tensor, matrix: torch.nn.Parameter) -> None:
        held.append(sum(other.grad is not None for other in found.values()))
        true(values, places, matrix)

    monkeypatch.setattr(sparse, "_take_entries", counted)
    trainable = sparse.apply(model, SIMPLE)
    optimizer = MasterOptimizer(trainable.parameters, optimizer="adamw", learning_rate=1e-2, weight_decay=0.0)
    backward(model, ROWS, sft.loss, 64)
    optimizer.step(1e-2, 1.0)
    assert held == [1] * len(found)
    assert not any(parameter.grad is not None for parameter in model.parameters())
    # Master and two moments for each chosen weight, in fp32 though the model is not, and a count per matrix.
    state = optimizer.state_tensors()
    assert sum(tensor.numel() for tensor in state.values()) == 3 * trainable.num_trainable + len(found)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    # Planted: a gradient that is not let go is counted at the next matrix.
    trainable.detach()
    held.clear()
    true = lambda values, places, matrix: None  # noqa: E731
    sparse.apply(model, SIMPLE)
    backward(model, ROWS, sft.loss, 64)
    assert held == [*range(1, len(found) + 1)]


def test_a_value_that_is_rounded_away_still_adds_up(tiny_model: Callable):
    """In bf16 a small step does not show in the matrix; its master keeps it."""
    model = tiny_model("llama", dtype="bfloat16").model
    trainable = sparse.apply(model, SIMPLE)
    name, values = next(iter(trainable.parameters.items()))
    place, start = int(sparse.choose(model, SIMPLE)[name][0]), float(values[0].detach())
    seen = []
    for _ in range(12):
        with torch.no_grad():
            values[0] += abs(start) / 1024
        logits_of(model)
        seen.append(float(dict(model.named_parameters())[name].detach().view(-1)[place]))
    assert seen[0] == start and seen[-1] > start


def test_the_start_can_be_put_in_place_for_a_pass(tiny_model: Callable):
    """What `train.kl_weight` computes the base by."""
    model = tiny_model("llama").model
    base = logits_of(model)
    trainable = sparse.apply(model, SIMPLE)
    anchor = Anchor(trainable.parameters)
    take_steps(trainable)
    moved = logits_of(model)
    with anchor.in_place(model):
        assert torch.equal(logits_of(model), base)
    assert torch.equal(logits_of(model), moved) and not torch.equal(moved, base)


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("gemma2", "bfloat16"), ("gpt2", "bfloat16")])
def test_places_and_values_are_saved_and_loaded_exactly(
    tiny_model: Callable, tiny_folder: Callable, tmp_path: Path, family: str, dtype: str
):
    base, folder = ModelConfig(name_or_path=str(tiny_folder(family))), tmp_path / "partial"
    trainable = sparse.apply(tiny_model(family, dtype=dtype).model, SIMPLE, base_name="somewhere/base")
    take_steps(trainable)
    expected = logits_of(trainable.model)
    trainable.save(folder)
    settings = read_json(folder / "partial_config.json")
    assert (settings["method"], settings["base_model_name_or_path"]) == ("sparse", "somewhere/base")
    saved = load_file(folder / "partial_model.safetensors")
    assert sum(tensor.nbytes for tensor in saved.values()) == trainable.num_trainable * (4 + getattr(torch, dtype).itemsize)
    load = lambda: load_trained(base, folder, dtype=getattr(torch, dtype)).model  # noqa: E731
    assert torch.equal(logits_of(load()), expected)
    assert all(torch.equal(tensor, trainable.merge().state_dict()[name]) for name, tensor in load().state_dict().items())
    # Planted: one place off.
    name = next(name for name in saved if name.endswith(".indices"))
    save_file(saved | {name: saved[name] - 1}, folder / "partial_model.safetensors")
    assert not torch.equal(logits_of(load()), expected)


def test_another_base_and_a_family_without_layers_are_refused(
    tiny_model: Callable, tiny_folder: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "partial"
    sparse.apply(tiny_model("llama").model, SIMPLE).save(folder)
    # Larger than what was trained on: every place is there, and means something else.
    other = ModelConfig(name_or_path=str(tiny_folder("llama", intermediate_size=128)))
    with pytest.raises(ModelError, match=r"has shape \(96, 64\), and the base has shape \(128, 64\)"):
        load_trained(other, folder, dtype=torch.float32)
    monkeypatch.setattr(sparse, "decoder_layers", lambda model: [])
    with pytest.raises(ConfigError, match="layers of the llama family cannot be told apart"):
        sparse.apply(tiny_model("llama").model, SIMPLE)


def test_what_a_run_chose_stays_chosen(tiny_model: Callable, tmp_path: Path):
    """On the rows with loss, once; a run that goes on reads it."""
    loaded, said = tiny_model("llama"), []
    method = MethodConfig(name="sparse", sparse_share=0.02, sparse_rows=2)
    resolved = ResolvedTraining(method, TrainConfig(seed=3), {})
    rows = [*ROWS, Row(np.arange(9), np.zeros(9, dtype=np.float32))]
    given = lambda folder, rows: given_to_method(loaded.model, rows, resolved, sft.loss, folder, said.append)["indices"]  # noqa: E731
    first = given(tmp_path / "a", rows)
    assert said[0].startswith("1,230 weights of 14 matrices chosen by fisher on 2 rows (")
    again = given(tmp_path / "a", ROWS[:1])
    assert len(said) == 1 and all(torch.equal(first[name], again[name]) for name in first)
    # Planted: without its file it chooses anew, and on other rows otherwise.
    (tmp_path / "a" / INDICES_FILE).unlink()
    anew = given(tmp_path / "a", ROWS[:1])
    assert any(not torch.equal(first[name], anew[name]) for name in first)
    assert (
        given_to_method(loaded.model, rows, ResolvedTraining(MethodConfig(), TrainConfig(), {}), sft.loss, tmp_path / "b", said.append)
        == {}
    )
