"""Masked language modelling: which tokens are hidden, what packed rows come to, and that a resumed run hides the same ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from parity.tolerances import PLANTED_FACTOR, allowed
from transformers import AutoModelForMaskedLM

import giong
from giong.config import MethodConfig, ModelConfig
from giong.engine.feed import Corrupt
from giong.engine.loop import train
from giong.engine.loop_config import LoopConfig
from giong.engine.step import evaluate_rows
from giong.errors import Interrupted
from giong.export.parity import compare_outputs
from giong.methods import METHODS
from giong.models.row_model import RowModel, label_settings, load_row_model
from giong.models.rows import Row
from giong.objectives import mlm
from giong.workflow import Story, perform
from giong.workflow.masking import hidden_logprobs, hide, masked_rows
from giong.workflow.row_training import trained_model
from giong.workspace import read_json

LONG = Row(np.arange(100, 1100), np.r_[0, np.ones(998), 0].astype(np.float32), "long", labels=np.arange(100, 1100))


def test_which_tokens_are_hidden_follows_from_seed_and_step_alone():
    """Of 998 tokens about 15 % are chosen, 80 % of them become the mask (99), 10 % another token (7), 10 % stay; the ends never."""

    def hidden(seed: int, step: int) -> Row:
        return mlm.masked([LONG], seed=seed, step=step, mask_id=99, token_ids=np.array([7]))[0]

    row = hidden(0, 3)
    chosen = np.flatnonzero(row.weights)
    assert 110 < len(chosen) < 190
    assert {0, 999}.isdisjoint(chosen)
    kinds = [np.mean(row.input_ids[chosen] == token) for token in (99, 7)]
    assert kinds[0] == pytest.approx(0.8, abs=0.12) and kinds[1] == pytest.approx(0.1, abs=0.08)
    untouched = np.setdiff1d(np.arange(1000), chosen)
    assert np.array_equal(row.input_ids[untouched], LONG.labels[untouched])
    assert np.array_equal(LONG.labels, np.arange(100, 1100))
    assert np.array_equal(hidden(0, 3).input_ids, row.input_ids)
    assert not np.array_equal(hidden(0, 4).input_ids, row.input_ids)
    assert not np.array_equal(hidden(1, 3).input_ids, row.input_ids)
    short = Row(np.array([2, 5, 3]), np.array([0, 1, 0], np.float32), labels=np.array([2, 5, 3]))
    assert all(mlm.masked([short], seed=0, step=step, mask_id=4, token_ids=np.array([6]))[0].weights[1] == 1 for step in range(20))


@pytest.fixture(scope="module", params=["bert", "modernbert"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RowModel:
    folder = tiny_models.save_encoder(request.param, tmp_path_factory.mktemp("mlm") / request.param)
    return load_row_model(ModelConfig(name_or_path=str(folder)), {"mask_share": 0.15}, dtype=torch.float32)


def rows_of(loaded: RowModel) -> list[Row]:
    return masked_rows(loaded, [*tiny_models._SENTENCES, "a short one"], [f"row {index}" for index in range(7)])[0]


@torch.no_grad()
def test_packed_rows_come_to_what_transformers_computes(loaded: RowModel):
    rows = hide(loaded, 0.15, seed=0)(rows_of(loaded), 0)
    found = evaluate_rows(loaded.model, rows, 200)
    expected = []
    for row in rows:
        logprobs = loaded.model(input_ids=torch.from_numpy(row.input_ids)[None]).logits[0].log_softmax(-1)
        places = np.flatnonzero(row.weights)
        expected.append(logprobs[places, row.labels[places]])
    assert float((torch.cat(found) - torch.cat(expected)).abs().max()) < allowed("packed_logprobs")
    # Planted: predicted from the position before, as a decoder would.
    shifted = evaluate_rows(loaded.model, [replace(row, labels=None) for row in rows], 200)
    assert float((torch.cat(shifted) - torch.cat(expected)).abs().max()) > PLANTED_FACTOR * allowed("packed_logprobs")


def trained(loaded: RowModel, folder: Path, corrupt: Corrupt, *, stop_after: int | None = None) -> dict[str, torch.Tensor]:
    trainable = METHODS["lora"].apply(loaded.model, MethodConfig(lora_r=4, lora_alpha=8.0, lora_dropout=0.0), seed=1)
    settings = LoopConfig(5e-3, 4.0, 4, 256, 0.1, "constant", "adamw", 0.0, 1.0, 0, 1e9, None, 1)
    done: list[float] = []
    try:
        train(
            trainable.model, trainable.parameters, rows_of(loaded), mlm.loss, settings, checkpoints=folder,
            emit=lambda event: done.append(event.data["loss"]) if event.kind == "step" else None,
            should_stop=lambda: len(done) == stop_after, corrupt=corrupt,
        )  # fmt: skip
        return {name: parameter.detach().clone() for name, parameter in trainable.parameters.items()}
    finally:
        trainable.detach()


@pytest.mark.parametrize("loaded", ["bert"], indirect=True)
def test_a_run_that_was_stopped_goes_on_with_the_same_masks(loaded: RowModel, tmp_path: Path):
    corrupt = hide(loaded, 0.15, seed=0)
    whole = trained(loaded, tmp_path / "whole", corrupt)
    with pytest.raises(Interrupted):
        trained(loaded, tmp_path / "stopped", corrupt, stop_after=3)
    resumed = trained(loaded, tmp_path / "stopped", corrupt)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    # Planted: masks that do not follow from the step.
    other = trained(loaded, tmp_path / "other", lambda rows, step: corrupt(rows, step + 1))
    assert not all(torch.equal(other[name], tensor) for name, tensor in whole.items())


def make_project(folder: Path, method: str) -> giong.Project:
    """Documents of a few words that always come together: hidden ones among them can be learnt."""
    writing = folder / "writing"
    writing.mkdir()
    for number in range(12):
        (writing / f"{number}.txt").write_text(f"The kettle sang before anyone had asked it to, {number} times. " * 2, encoding="utf-8")
    settings = {
        "task": "mlm", "data": {"min_words": 5, "max_words": 30}, "method": {"name": method}, "evaluation": {"num_bootstrap": 100},
        "train": {"num_epochs": 6, "learning_rate": 3e-3, "batch_rows": 4, "eval_steps": 4},
    }  # fmt: skip
    model = tiny_models.save_encoder("bert", folder / "bert")
    return giong.init(folder / "reader", sources=[writing], model=str(model), settings=settings)


def test_the_story_of_an_encoder_that_goes_on_learning(tmp_path: Path):
    project = make_project(tmp_path, "full")
    perform(Story(project))
    evaluation = read_json(project.root / "evaluation.json")
    assert [arm["name"] for arm in evaluation["arms"]] == ["base", "fine_tuned"]
    assert evaluation["verdict"]["decision"] == "train" and evaluation["gain"]["low"] > 0.5
    assert "nats per hidden token" in project.report_path.read_text(encoding="utf-8")
    AutoModelForMaskedLM.from_pretrained(project.model_path("reader") / "weights")


def test_an_exported_encoder_is_the_trained_one(tmp_path: Path):
    project = make_project(tmp_path, "lora")
    story = Story(project)
    perform(story, ["import", "train", "export"])
    for fmt in ("adapter", "merged"):
        parity = project.step_result(f"export-{fmt}")["parity"]
        assert parity["passed"] and parity["num_texts"] == len(story.passage_texts("test")) > 1
    # A stranger's way, and as the base of another project.
    folder = project.root / "exports" / "reader-merged"
    AutoModelForMaskedLM.from_pretrained(folder)
    read = lambda path, settings: load_row_model(ModelConfig(name_or_path=str(path)), settings, dtype=torch.float32)  # noqa: E731
    assert read(folder, label_settings(["a", "b"], "single_label")).model.config.num_labels == 2
    # Planted: the untuned base is another model.
    test = story.split.passages("test", story.passages)
    exported, base = (hidden_logprobs(story, read(path, {"mask_share": 0.15}), test) for path in (folder, tmp_path / "bert"))
    tuned = hidden_logprobs(story, trained_model(story)[0], test)
    assert compare_outputs(tuned, exported, "float32", num_texts=len(test)).passed
    assert not compare_outputs(tuned, base, "float32", num_texts=len(test)).passed
