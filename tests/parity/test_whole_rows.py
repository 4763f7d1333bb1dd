"""Rows that are judged as a whole: what packed rows come to is what transformers computes for each of them, for every kind of head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from moving_parts import CASES
from parity.tolerances import PLANTED_FACTOR, allowed
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from giong.config import ModelConfig
from giong.engine import step as engine_step
from giong.engine.loop import train
from giong.engine.loop_config import LoopConfig
from giong.engine.row_check import check_rows
from giong.engine.step import backward, evaluate_rows
from giong.errors import ModelError
from giong.methods import METHODS
from giong.models.row_model import RowModel, label_settings, load_row_model, load_trained_row_model, pad_apart, text_rows
from giong.models.rows import Row
from giong.objectives import classify

FAMILIES = ("bert", "modernbert", "qwen2", "gpt2", "gemma2")
LABELS = ("calm", "cross", "glad")
SETTINGS = label_settings(LABELS, "single_label")
METHOD_CASES = [("bert", "lora"), ("bert", "last_layers"), ("bert", "norm"), ("modernbert", "lora"), ("gpt2", "full")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("row_models")

    def of(family: str) -> Path:
        save = tiny_models.save_encoder if family in tiny_models.ENCODERS else tiny_models.save_model
        return root / family if (root / family).exists() else save(family, root / family)

    return of


@pytest.fixture(scope="module")
def loaded(folder: Callable[[str], Path]) -> Callable[..., RowModel]:
    return lambda family, settings=SETTINGS: load_row_model(ModelConfig(name_or_path=str(folder(family))), settings, dtype=torch.float32)


def rows_of(row_model: RowModel) -> list[Row]:
    texts = [*tiny_models._SENTENCES, "a short one"]
    targets = [np.eye(len(LABELS))[index % len(LABELS)] for index in range(len(texts))]
    return text_rows(row_model, texts, [f"row {index}" for index in range(len(texts))], targets)[0]


@torch.no_grad()
def one_by_one(model: torch.nn.Module, rows: list[Row]) -> torch.Tensor:
    return torch.cat([model(input_ids=torch.from_numpy(row.input_ids)[None]).logits for row in rows])


@contextmanager
def causal(model: torch.nn.Module) -> Iterator[None]:
    """Planted: an encoder's queries see only what lies before them."""
    modules = [module for module in model.modules() if getattr(module, "is_causal", None) is False]
    for module in modules:
        module.is_causal = True
    yield
    for module in modules:
        module.is_causal = False


def test_rows_that_end_with_the_filler_get_another_one(folder: Callable[[str], Path], loaded: Callable):
    """Mistral fills with the token that ends its turns: transformers' head would read the one before it."""
    settings = label_settings([], "regression")
    model = loaded("mistral", settings)
    end = model.tokenizer.eos_token_id
    rows = [replace(row, input_ids=np.append(row.input_ids, end), weights=np.append(row.weights, 0.0)) for row in rows_of(model)]
    rows = [replace(row, target=np.zeros(1, np.float32)) for row in rows]
    with pytest.raises(ModelError, match="come to other numbers"):
        check_rows(model.model, rows)
    pad = pad_apart(model, {end})
    assert pad not in (None, end)
    check_rows(model.model, rows)
    again = loaded("mistral", {**settings, "pad_token_id": pad})
    assert again.model.config.pad_token_id == again.tokenizer.pad_token_id == pad
    assert pad_apart(again, {end}) is None
    with pytest.raises(ModelError, match="Add a pad token"):
        pad_apart(loaded("gpt2", settings), {loaded("gpt2", settings).tokenizer.eos_token_id})


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_come_to_what_transformers_computes(loaded: Callable, family: str, monkeypatch: pytest.MonkeyPatch):
    row_model = loaded(family)
    rows, model = rows_of(row_model), row_model.model
    expected = one_by_one(model, rows)
    assert float((torch.stack(evaluate_rows(model, rows, 200)) - expected).abs().max()) < allowed("packed_logprobs")
    check_rows(model, rows)
    # Planted: rows pooled one token off, and attention that looks one way only.
    moved = engine_step.row_outputs
    monkeypatch.setattr(engine_step, "row_outputs", lambda model, hidden_TD, lengths: moved(model, hidden_TD.roll(1, 0), lengths))
    off = float((torch.stack(evaluate_rows(model, rows, 200)) - expected).abs().max())
    with pytest.raises(ModelError, match="Packed rows of the .* family come to other numbers"):
        check_rows(model, rows)
    monkeypatch.undo()
    if family in tiny_models.ENCODERS:
        with causal(model):
            off = min(off, float((torch.stack(evaluate_rows(model, rows, 200)) - expected).abs().max()))
    assert off > PLANTED_FACTOR * allowed("packed_logprobs")


@pytest.mark.parametrize("family", ["modernbert", "qwen2"])
def test_gradients_are_those_of_one_row_at_a_time(loaded: Callable, family: str):
    row_model = loaded(family)
    rows, model = rows_of(row_model), row_model.model.requires_grad_(True)
    figures = backward(model, rows, classify.loss, 200)
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    total = sum(
        torch.nn.functional.cross_entropy(
            model(input_ids=torch.from_numpy(row.input_ids)[None]).logits, torch.from_numpy(row.target)[None], reduction="sum"
        )
        for row in rows
    ) / len(rows)
    total.backward()
    assert figures["loss"] == pytest.approx(float(total.detach()), abs=allowed("packed_logprobs"))
    assert 0.0 <= figures["accuracy"] <= 1.0
    for name, gradient in packed.items():
        own = dict(model.named_parameters())[name].grad
        assert float((gradient - own).abs().max()) <= allowed("gradients") * max(1.0, float(own.abs().max())), name


@pytest.mark.parametrize(("family", "case"), METHOD_CASES)
def test_every_method_trains_the_head_and_what_is_saved_is_what_was_trained(
    folder: Callable, loaded: Callable, tmp_path: Path, family: str, case: str
):
    """Through the one loop; then loaded again here, and where it is an adapter, by plain PEFT."""
    config, row_model = ModelConfig(name_or_path=str(folder(family))), loaded(family)
    rows = rows_of(row_model)
    untrained = one_by_one(row_model.model, rows)
    trainable = METHODS[CASES[case].name].apply(row_model.model, CASES[case], seed=1)
    assert torch.allclose(torch.stack(evaluate_rows(trainable.model, rows, 200)), untrained, atol=allowed("packed_logprobs"))
    settings = LoopConfig(1e-2, 6.0, 4, 256, 0.1, "constant", "adamw", 0.0, 1.0, 0, 1e9, None, 1)
    losses: list[float] = []
    train(
        trainable.model, trainable.parameters, rows, classify.loss, settings, checkpoints=tmp_path / "checkpoints",
        emit=lambda event: losses.append(event.data["loss"]) if event.kind == "step" else None,
    )  # fmt: skip
    assert np.mean(losses[-2:]) < np.mean(losses[:2])
    trained = torch.stack(evaluate_rows(trainable.model, rows, 200))
    artifact = tmp_path / trainable.format
    trainable.save(artifact)
    if trainable.format == "weights":
        row_model.tokenizer.save_pretrained(artifact)
        plain = AutoModelForSequenceClassification.from_pretrained(artifact)
        assert plain.config.id2label == dict(enumerate(LABELS))
        assert torch.allclose(one_by_one(plain, rows), trained, atol=allowed("merged_logits"))
    elif trainable.format == "adapter":
        plain = PeftModel.from_pretrained(loaded(family).model, artifact)
        assert torch.allclose(one_by_one(plain, rows), trained, atol=allowed("merged_logits"))
    again = load_trained_row_model(config, SETTINGS, artifact, trainable.format, dtype=torch.float32)
    assert float((one_by_one(again.model, rows) - trained).abs().max()) < allowed("merged_logits")
    # Planted: a head that is not saved would be drawn anew.
    assert float((one_by_one(loaded(family).model, rows) - trained).abs().max()) > PLANTED_FACTOR * allowed("merged_logits")


def test_a_text_that_is_too_long_is_cut_and_named(folder: Callable):
    row_model = load_row_model(ModelConfig(name_or_path=str(folder("bert")), max_seq_length=8), SETTINGS, dtype=torch.float32)
    rows, cut = text_rows(row_model, ["one", "a much longer text than eight tokens can hold"], ["a", "b"], [np.eye(3)[0]] * 2)
    assert cut == ["b"]
    assert len(rows[1]) == 8
    assert rows[1].input_ids[-1] == row_model.tokenizer.sep_token_id


def test_an_unknown_head_is_refused():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    model = DistilBertForSequenceClassification(DistilBertConfig(vocab_size=32, dim=16, n_layers=1, n_heads=2, hidden_dim=16))
    row = Row(np.arange(2, 8), np.zeros(6, np.float32), "a", np.eye(2)[0])
    with pytest.raises(ModelError, match="head of the distilbert family is not known"):
        evaluate_rows(model.eval(), [row], 64)
