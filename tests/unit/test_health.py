"""Diagnoses of the first steps: each planted fault is named, and healthy runs are left in peace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_loop import CONFIG, DROPOUT_LORA, FULL, Run
from tiny_models import FAMILIES

import giong.engine.health as health
import giong.engine.step as step
from giong.config import MethodConfig, ModelConfig
from giong.contracts import LossSum
from giong.engine.health import diagnose_labels, diagnose_pack, diagnose_rates, diagnose_reach, diagnose_rows, is_better
from giong.engine.packing import Pack, pack
from giong.errors import ConfigError, DataError, TrainingError
from giong.models.load import LoadedModel, load_model
from giong.models.rows import Row, raw_text_rows
from giong.objectives import sft

END = 7
TEXT = (
    "When the rain had stopped, the two of them walked down to the river and looked at the bridge. It was older than anyone in the "
    "village could remember, and for as long as they had lived there it had been about to fall. The man said that he would cross it "
    "first. The woman laughed and told him that this was how his father had lost a hat, a horse and most of his money."
)


def found(run: Run) -> list[str]:
    return [event.data["diagnosis"] for event in run.events if "diagnosis" in event.data]


def answer(*ids: int, prompt: int = 3, name: str = "") -> Row:
    """A row of `prompt` tokens without loss, then these with loss."""
    weights = np.array([0.0] * prompt + [1.0] * len(ids), dtype=np.float32)
    return Row(np.array([*range(20, 20 + prompt), *ids]), weights, name)


@pytest.mark.parametrize("method", [DROPOUT_LORA, FULL, DROPOUT_LORA.model_copy(update={"target_modules": ["q_proj"]})])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_healthy_run_is_silent(tiny_model: Callable, tmp_path: Path, method: MethodConfig, weight_decay: float):
    run = Run(tiny_model, tmp_path, method, replace(CONFIG, num_epochs=8, weight_decay=weight_decay))
    run.go()
    assert found(run) == []


@pytest.mark.parametrize("num_epochs", [1 / 3, 2 / 3, 1])
def test_a_run_of_one_to_three_steps_is_silent_too(tiny_model: Callable, tmp_path: Path, num_epochs: float):
    """LoRA's A has no gradient in the first step, because B is zero."""
    run = Run(tiny_model, tmp_path, config=replace(CONFIG, num_epochs=num_epochs))
    assert run.go().num_steps == round(3 * num_epochs)
    assert found(run) == []


def test_rows_of_which_some_or_all_have_no_loss():
    silent = replace(answer(5, END, name="letter-3"), weights=np.zeros(5, dtype=np.float32))
    (some,) = diagnose_rows([answer(5, END), silent])
    assert (some.name, some.error) == ("rows_without_loss", None)
    assert "1 of 2 rows" in some.message and "letter-3" in some.message
    (every,) = diagnose_rows([silent, silent])
    assert (every.name, every.error) == ("no_loss_tokens", DataError)
    assert [diagnosis.name for diagnosis in diagnose_rows([])] == ["no_loss_tokens"]
    assert list(diagnose_rows([answer(5, END), answer(6, 6)])) == []


def test_an_end_of_turn_token_that_is_not_in_the_loss():
    good, masked, missing = answer(5, END), answer(5, END), answer(5, 6, 5, name="note-9")
    masked.weights[-1] = 0.0
    assert list(diagnose_rows([good, good], [END, 8])) == []
    (some,) = diagnose_rows([good, good, missing], [END])
    assert (some.name, some.error) == ("end_of_turn_not_in_loss", None)
    assert "1 of 3 rows" in some.message and "note-9" in some.message
    (every,) = diagnose_rows([masked, missing], [END])
    assert (every.name, every.error) == ("end_of_turn_not_in_loss", DataError)


def test_running_text_beside_answers_ends_no_turn():
    text = answer(5, 6, 5)
    text.weights[1:] = 1.0
    assert list(diagnose_rows([answer(5, END), text], [END])) == []
    (some,) = diagnose_rows([answer(5, END), answer(5, 6, 5, name="note-9"), text], [END])
    assert "1 of 2 rows" in some.message and "note-9" in some.message
    (alone,) = diagnose_rows([text, text], [END])
    assert alone.error is DataError, "loss on requests too: every row is a turn"


def test_weights_that_are_shifted_by_one_lose_the_end_of_turn_token(tiny_model: Callable, tmp_path: Path):
    """The planted shift of the mask: from the last token of the prompt to the last but one of the answer."""
    run = Run(tiny_model, tmp_path)
    run.rows = [answer(5, 6, 9, END), answer(11, END)]
    run.options = {"end_of_turn_ids": (END,)}
    run.go()
    assert found(run) == []
    shifted = Run(tiny_model, tmp_path / "shifted")
    shifted.rows = [replace(row, weights=np.roll(row.weights, -1)) for row in run.rows]
    shifted.options = run.options
    with pytest.raises(DataError, match="end-of-turn token is not in the loss of any row"):
        shifted.go()
    assert found(shifted) == ["end_of_turn_not_in_loss"]
    assert shifted.step_done() == 0
    assert not (tmp_path / "shifted").exists()


def test_a_learning_rate_of_zero(tiny_model: Callable, tmp_path: Path):
    run = Run(tiny_model, tmp_path, config=replace(CONFIG, learning_rate=0.0))
    with pytest.raises(ConfigError, match="zero in every step") as caught:
        run.go()
    assert "train.learning_rate" in caught.value.remedy
    assert found(run) == ["learning_rate_zero"]
    assert list(diagnose_rates([1e-4, 0.0])) == []


@pytest.mark.parametrize("method", [DROPOUT_LORA, FULL], ids=["lora", "full in bf16"])
def test_no_gradient_arrives(tiny_model: Callable, tmp_path: Path, method: MethodConfig):
    """The planted fault: an objective that has lost its graph. Weight decay moves the weights all the same."""
    run = Run(tiny_model, tmp_path, method, replace(CONFIG, weight_decay=0.1))

    def objective(tensors: dict[str, torch.Tensor]) -> LossSum:
        result = sft.loss(tensors)
        return replace(result, loss_sum=result.loss_sum.detach() + 0 * result.loss_sum)

    with pytest.raises(TrainingError, match="No trainable weight has changed in 3 steps") as caught:
        run.go(objective=objective)
    assert "No gradient arrives" in caught.value.remedy
    assert found(run) == ["nothing_moves"]
    assert run.step_done() == 3


def test_steps_too_small_to_move_anything(tiny_model: Callable, tmp_path: Path):
    run = Run(tiny_model, tmp_path, FULL, replace(CONFIG, learning_rate=1e-30, weight_decay=0.0))
    with pytest.raises(TrainingError, match="No trainable weight has changed") as caught:
        run.go()
    assert caught.value.remedy == "Raise train.learning_rate."


def test_an_adapter_that_is_never_called(tiny_model: Callable, tmp_path: Path):
    """The planted fault: the model's second MLP is skipped, so three adapters of two tensors each are never reached."""
    run = Run(tiny_model, tmp_path, config=replace(CONFIG, num_epochs=8))
    run.prepare = lambda model: setattr(model.model.layers[1].mlp, "forward", lambda hidden: hidden)
    run.go()
    assert found(run) == ["adapter_never_reached"]
    (event,) = [event for event in run.events if "diagnosis" in event.data]
    assert event.data["step"] == 20
    assert "6 of 28 trainable tensors" in event.message and "layers.1.mlp" in event.message


def test_what_counts_as_reached():
    zeros, ones = torch.zeros(3), torch.ones(3)
    state = {
        "master/a": ones,
        "adamw/exp_avg/a": ones,
        "adamw/step/a": torch.tensor(3.0),
        "master/b/c": ones,
        "muon/momentum_buffer/b/c": ones,
    }
    assert list(diagnose_reach(state)) == []
    (diagnosis,) = diagnose_reach(state | {"adamw/exp_avg/a": zeros})
    assert "1 of 2 trainable tensors" in diagnosis.message and diagnosis.message.endswith("first: a")
    assert diagnosis.error is None


@pytest.fixture(scope="module")
def bundled() -> LoadedModel:
    """The bundled base: it knows English well enough to tell the next token from the one after."""
    return load_model(ModelConfig(), dtype=torch.float32)


@pytest.fixture(scope="module")
def english(bundled: LoadedModel) -> Pack:
    rows, _ = raw_text_rows(bundled, [TEXT])
    return pack(rows)


def planted(given: Pack, by: int) -> Pack:
    """The same positions with the token `by` further on (or back) as target."""
    keep = (given.loss_positions_N + 1 + by < len(given.input_ids_T)) & (given.loss_positions_N + 1 + by >= 0)
    positions = given.loss_positions_N[keep]
    return replace(
        given, loss_positions_N=positions, targets_N=given.input_ids_T[positions + 1 + by], weights_N=given.weights_N[keep],
        row_of_N=given.row_of_N[keep],
    )  # fmt: skip


def test_labels_that_are_shifted(bundled: LoadedModel, english: Pack):
    assert list(diagnose_pack(bundled.model, english)) == []
    # Shifted twice: the target is the token after the next, and the previous target is the right one.
    (twice,) = diagnose_pack(bundled.model, planted(english, 1))
    assert (twice.name, twice.error) == ("labels_shifted", DataError)
    assert "the previous token fits" in twice.message
    # Not shifted at all: the target is the token that is already there.
    (never,) = diagnose_pack(bundled.model, planted(english, -1))
    assert "the next token fits" in never.message


def test_a_run_on_labels_that_are_shifted_stops_before_its_first_step(
    tmp_path: Path, bundled: LoadedModel, monkeypatch: pytest.MonkeyPatch
):
    """Planted where labels are made, for the engine's step and for its diagnosis alike."""

    def run(folder: str) -> Run:
        made = Run(lambda *_, **__: load_model(ModelConfig(), dtype=torch.float32), tmp_path / folder, config=replace(CONFIG, num_epochs=1))
        made.rows, _ = raw_text_rows(bundled, [TEXT])
        return made

    well = run("well")
    well.go()
    assert (found(well), well.step_done()) == ([], 1)
    for module in (health, step):
        monkeypatch.setattr(module, "pack", lambda rows: planted(pack(rows), 1))
    shifted = run("shifted")
    with pytest.raises(DataError, match="labels look shifted by one"):
        shifted.go()
    assert (found(shifted), shifted.losses()) == (["labels_shifted"], {})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_knows_nothing_is_no_reason_to_complain(tiny_model: Callable, family: str):
    """Random weights, also with a tied head, which likes to repeat its input."""
    loaded = tiny_model(family)
    generator = np.random.default_rng(1)
    for _ in range(5):
        rows = [Row(generator.integers(0, 400, size=60), np.array([0.0] * 20 + [1.0] * 40, dtype=np.float32)) for _ in range(6)]
        assert list(diagnose_labels(loaded.model, rows)) == []
    assert not loaded.model.training


def test_better_by_more_than_chance():
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0))
    assert is_better(1.0 + noise)
    assert not is_better(0.4 + noise)
    assert not is_better(1.0 + 10 * noise)
    assert not is_better(torch.full((15,), 9.0))
