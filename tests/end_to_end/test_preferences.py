"""From a preference file to a better-aligned model through the command line and Python, on the bundled base; and what is impossible."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import giong
from small_writing import author_passage

import giong as package
from giong import errors
from giong.project import init
from giong.workspace import Project, read_json, read_jsonl

NUM_PAIRS = 14


def write_pairs(folder: Path, num_pairs: int = NUM_PAIRS) -> Path:
    """Short answers are preferred to long ones: what a vote's export looks like."""
    import random

    generator = random.Random(5)
    path = folder / "pairs.jsonl"
    rows = []
    for number in range(num_pairs):
        long = author_passage(generator)
        rows.append({
            "prompt": [{"role": "user", "content": f"Say something about day {number}."}],
            "chosen": [{"role": "assistant", "content": " ".join(long.split()[:6]) + "."}],
            "rejected": [{"role": "assistant", "content": long}],
        })  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_project(folder: Path, name: str, **settings: Any) -> Project:
    defaults = {
        "model": {"dtype": "float32"},
        "method": {"lora_dropout": 0.0},
        "objective": {"name": name},
        "data": {"preferences": "../pairs.jsonl"},
    }
    train = {"num_epochs": 2, "batch_rows": 4, "learning_rate": 2e-4, "eval_steps": 3}
    return init(folder / "voice", settings={**defaults, "train": train, **settings})


def steps_of(project: Project) -> Sequence[dict[str, Any]]:
    events = read_jsonl(next((project.root / "runs").iterdir()) / "events.jsonl")
    return [event["data"] for event in events if event["kind"] == "step"]


def test_dpo_from_votes_to_a_model(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    project = make_project(tmp_path, "dpo")
    assert "12 pairs to learn from, 2 held out" in giong("train", "--project", project.root).worked().told
    run = next((project.root / "runs").iterdir())
    results, steps = read_json(run / "results.json"), steps_of(project)
    # Twelve pairs, four a step, two epochs; the untouched model is its own reference.
    assert len(steps) == 6
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=2e-3)
    assert steps[0]["length_chosen"] < steps[0]["length_rejected"]
    assert results["held_out"]["rewards_accuracy"] == 1.0
    assert results["held_out"]["loss"] < 0.6 and results["validation_loss"] == pytest.approx(results["held_out"]["loss"], abs=1e-4)
    assert len(list(run.glob("reference-*.npy"))) == 2
    assert (project.root / "models" / "voice" / "adapter" / "adapter_model.safetensors").is_file()
    assert set(read_json(run / "run.json")["settings"]["objective"]) == {"name", "beta", "dpo_loss", "label_smoothing", "length_alpha"}
    # What the reference said is in the run's folder: a run that is resumed asks no model.
    from types import SimpleNamespace

    from giong.models.load import load_model
    from giong.models.preference_rows import preference_rows
    from giong.workflow import Story
    from giong.workflow.preferring import referenced

    story = Story(project)
    loaded = load_model(story.config.model)
    rows, _ = preference_rows(loaded.chat, loaded.max_seq_length, story.preferences["calibration"])
    again = referenced(story, SimpleNamespace(model=None), rows, run, 2048, "train")
    assert all(len(row.extras["reference_logprobs_N"]) == np.count_nonzero(row.weights) for row in again)
    with pytest.raises(AttributeError):
        referenced(story, SimpleNamespace(model=None), rows[::-1], run, 2048, "train")
    # Nothing is trained twice.
    package.run(project, ["train"])
    assert read_json(run / "results.json") == results


@pytest.mark.parametrize("name", ["orpo", "simpo", "kto"])
def test_the_other_objectives_walk_the_same_way(name: str, tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    """With all weights trained, the head among them; pairs serve as ratings too."""
    from giong.workflow import Story, perform

    write_pairs(tmp_path)
    train = {"num_epochs": 2, "batch_rows": 4, "learning_rate": 1e-3}
    project = make_project(
        tmp_path, name, model={"name_or_path": str(tiny_folder("qwen2")), "dtype": "float32"}, method={"name": "full"}, train=train
    )
    story = Story(project)
    perform(story, ["train"])
    steps, held_out = steps_of(project), read_json(next((project.root / "runs").iterdir()) / "results.json")["held_out"]
    assert len(steps) == 2 * (6 if name == "kto" else 3)
    assert steps[-1]["loss"] < steps[0]["loss"]
    if name == "kto":
        assert steps[0]["loss"] == pytest.approx(0.5, abs=1e-4)
        assert held_out["accuracy"] > 0.5
    else:
        assert held_out["rewards_accuracy"] == 1.0
    assert (project.root / "models" / "voice" / "weights" / "model.safetensors").is_file()


def test_a_reward_model_prefers_what_was_preferred(tmp_path: Path) -> None:
    """Saved as a classifier with one output, which transformers loads and scores alike; nothing else takes it for a model that writes."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from giong.config import load
    from giong.contracts import ScoreRequest
    from giong.data.preferences import read_preferences
    from giong.workflow import Story
    from giong.workflow.rewarding import load_reward_model

    path = write_pairs(tmp_path)
    train = {"num_epochs": 3, "batch_rows": 4, "learning_rate": 1e-3, "eval_steps": 5}
    project = make_project(tmp_path, "reward", train=train, method={"name": "last_layers", "num_layers": 1})
    told = giong("train", "--project", project.root).worked().told
    assert "2 held-out pairs: accuracy 1.00" in told
    folder = project.root / "reward_models" / "voice"
    figures = read_json(folder / "held_out.json")
    assert figures["num_pairs"] == 2 and figures["log_loss"] < 0.69 and 0 <= figures["calibration_error"] < 0.5
    assert steps_of(project)[-1]["rewards_accuracy"] == 1.0
    assert not (project.root / "models").exists()
    # Scores one by one, through transformers' own forward pass.
    model = load_reward_model(Story(project, load(project.config_path)))
    pairs = read_preferences(path)[:2]
    scores = model.rewards([ScoreRequest(answer, pair.messages) for pair in pairs for answer in (pair.chosen, pair.rejected)])
    assert scores[0] > scores[1] and scores[2] > scores[3]
    model.loaded.model.save_pretrained(tmp_path / "plain")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    ids = model.chat.encode(pairs[0].messages, pairs[0].chosen).input_ids
    assert plain(input_ids=torch.as_tensor(ids)[None]).logits[0, 0].item() == pytest.approx(scores[0], abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "row", "error", "message"),
    [
        ({"data": {}}, None, errors.ConfigError, "objective.name dpo learns from pairs: name their file in data.preferences"),
        ({}, {"prompt": "Who?", "chosen": "Me.", "rejected": "Me."}, errors.DataError, "line 15: the two answers are equal"),
        ({"data": {"preferences": "../none.jsonl"}}, None, errors.DataError, "There is no preference file at this path"),
    ],
)
def test_what_is_impossible_is_told_before_anything_is_loaded(
    settings: dict[str, Any], row: dict[str, Any] | None, error: type[errors.GiongError], message: str, tmp_path: Path
) -> None:
    path = write_pairs(tmp_path)
    if row:
        path.write_text(path.read_text(encoding="utf-8") + json.dumps(row) + "\n", encoding="utf-8")
    project = make_project(tmp_path, "sft", **settings)
    project.config_path.write_text(project.config_path.read_text(encoding="utf-8").replace("name: sft", "name: dpo"), encoding="utf-8")
    giong("train", "--project", project.root).refused(error, message)
    assert not (project.root / "runs").exists() and not (project.root / "steps" / "probe.json").exists()
