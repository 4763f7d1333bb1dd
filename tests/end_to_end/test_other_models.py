"""Objectives that listen to another model, at tiny size. The whole loop: a preference file, a reward model from it, reinforcement
learning on its score, a model that is saved; and a student that learns from a teacher, on the author's answers and on its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from end_to_end.test_story import make_project
from safetensors.numpy import load_file

from giong.config import with_settings
from giong.contracts import Reply, ScoreRequest
from giong.errors import ConfigError, GiongError, ModelError
from giong.workflow import Story, perform
from giong.workspace import Project, read_json, read_jsonl

REWARDS = {"reward_model": 1.0, "ends": 0.5}
GRPO = {"name": "grpo", "num_generations": 4, "max_new_tokens": 6, "rewards": REWARDS, "reward_model": "from-pairs"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Project:
    """A project with its requests and with pairs in which the answer that asks nothing is preferred."""
    made = make_project(tmp_path_factory.mktemp("loop"), tiny_folder("qwen2", max_position_embeddings=1024))
    pairs = [{"prompt": f"Day {day}?", "chosen": f"It rained on {day}.", "rejected": f"Did it? Why {day}?"} for day in range(10)]
    (made.root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    perform(Story(made), ["import", "synth"])
    return made


def story_of(project: Project, called: str, **objective: object) -> Story:
    story = Story(project)
    settings = {"name": called, "objective": objective, "data.preferences": "pairs.jsonl", "train.num_epochs": 1, "train.batch_rows": 8}
    story.config = with_settings(story.config, {**settings, "sampling.temperature": 0.0, "train.learning_rate": 1e-3})
    return story


def moved(checkpoints: Path) -> set[str]:
    """The parameters whose masters the newest checkpoint holds."""
    return {
        name.removeprefix("master/") for name in load_file(sorted(checkpoints.glob("*/*.safetensors"))[-1]) if name.startswith("master/")
    }


def test_from_preferences_to_a_model_that_is_rewarded(project: Project) -> None:
    from giong.workflow.rewarding import load_reward_model
    from giong.workflow.rewards import Rewards

    online = story_of(project, "online", **GRPO)
    with pytest.raises(ConfigError, match="'from-pairs' is neither a reward model of the project nor a folder with one"):
        perform(online, ["train"])
    assert not (project.root / "runs").exists() and not (project.root / "steps" / "probe.json").exists()
    judge = story_of(project, "from-pairs", name="reward")
    perform(judge, ["train"])
    perform(online, ["train"])
    model = read_json(project.root / "models" / "online" / "model.json")
    draws = read_jsonl(project.root / "runs" / model["run"] / "draws.jsonl")
    assert draws
    for line in draws:
        assert line["reward"] == pytest.approx(line["reward_reward_model"] + 0.5 * line["reward_ends"])
    # Token by token, with a value head that stays with the run.
    perform(story_of(project, "by-token", **{**GRPO, "name": "ppo", "num_updates": 2}), ["train"])
    model = project.root / "models" / "by-token"
    run = project.run_path(read_json(model / "model.json")["run"])
    steps = [event["data"] for event in read_jsonl(run / "events.jsonl") if event["kind"] == "step"]
    assert {"reward_reward_model", "value_loss", "explained_variance", "kl"} <= steps[-1].keys()
    assert {"value_head.weight", "value_head.bias"} <= moved(run / "checkpoints")
    assert not any("value_head" in name for name in load_file(model / "adapter" / "adapter_model.safetensors"))
    # By the path of its folder it is the same model; the score is of the answer to that very request.
    by_path = story_of(project, "online", **{**GRPO, "reward_model": "reward_models/from-pairs"})
    examples, texts = by_path.examples_of("train")[:2], ("It rained.", "Why?")
    found = Rewards(by_path, REWARDS)(examples, [Reply(text) for text in texts])["reward_model"]
    expected = load_reward_model(judge).rewards([ScoreRequest(text, one.messages) for text, one in zip(texts, examples)])
    assert found == pytest.approx(np.array(expected), abs=1e-6)


@pytest.mark.parametrize("objective", [{"rewards": {"reward_model": 1.0}}, {"reward_model": "from-pairs"}])
def test_a_reward_model_and_its_weight_go_together(objective: dict, project: Project) -> None:
    with pytest.raises(ConfigError, match="reward_model and its weight go together"):
        story_of(project, "online", name="grpo", **objective)


def test_a_student_comes_closer_to_its_teacher(project: Project, tiny_folder: Callable[..., Path]) -> None:
    teacher = tiny_folder("qwen2", max_position_embeddings=1024, num_hidden_layers=3)
    story = story_of(project, "student", name="distill", teacher=str(teacher), teacher_share=0.9, on_policy_share=0.5, max_new_tokens=6)
    story.config = with_settings(story.config, {"train.learning_rate": 1e-2, "train.num_epochs": 4})
    perform(story, ["train"])
    run = project.run_path(read_json(project.root / "models" / "student" / "model.json")["run"])
    steps = [event["data"] for event in read_jsonl(run / "events.jsonl") if event["kind"] == "step"]
    drawn, written = ([step for step in steps if ("length" in step) is own] for own in (True, False))
    assert drawn and len(written) > 1
    assert written[-1]["teacher_kl"] < 0.95 * written[0]["teacher_kl"]
    for step in steps:
        assert step["loss"] == pytest.approx(0.9 * step["teacher_kl"] + 0.1 * step["nll"], abs=1e-5)
    assert all(step["nll"] == 0 and step["generate_seconds"] > 0 for step in drawn)
    assert read_json(run / "run.json")["settings"]["objective"].keys() == {
        "name", "teacher", "teacher_share", "on_policy_share", "temperature", "max_new_tokens",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("teacher", "error", "message"),
    [("llama", ConfigError, "The teacher has another tokenizer"), ("nowhere", ModelError, "Correct `objective.teacher`")],
)
def test_a_teacher_that_cannot_teach(
    teacher: str, error: type[GiongError], message: str, project: Project, tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.from_pretrained", None)
    folder = tiny_folder(teacher) if teacher == "llama" else project.root / teacher
    with pytest.raises(error, match=message):
        perform(story_of(project, "student", name="distill", teacher=str(folder)), ["train"])


@pytest.mark.parametrize(
    ("objective", "message"),
    [({"name": "distill"}, "name its folder in teacher"), ({"name": "ppo"}, "objective.name ppo trains in one process")],
)
def test_what_cannot_be_is_said_by_the_settings(objective: dict, message: str, project: Project) -> None:
    with pytest.raises(ConfigError, match=message):
        with_settings(story_of(project, "online").config, {"objective": objective, "train.num_processes": 2})
