"""The methods `sparse` and `bottleneck` through the story, in this process: trained, measured, exported or refused, served."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_writing
import torch
from transformers import AutoModelForCausalLM

import giong
from giong.config import load, with_settings
from giong.contracts import Event
from giong.errors import StoryError
from giong.models.trained import load_trained
from giong.project import init
from giong.serving.served_models import ServedModels
from giong.sizing.shapes import num_trainable_parameters
from giong.sizing.units import format_bytes
from giong.workflow import Story, perform
from giong.workflow.training import nll_per_document, plan_run, score_answers, tuned
from giong.workspace import Project, read_json

FAST = {"train.num_epochs": 2, "train.learning_rate": 0.02, "sampling.temperature": 0.7}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Project:
    folder = tmp_path_factory.mktemp("moving")
    settings = {section: dict(values) for section, values in small_writing.SETTINGS.items()}
    settings["model"] = {"name_or_path": str(tiny_folder("qwen2")), "dtype": "float32", "max_seq_length": 400}
    writing = small_writing.write_author(folder / "writing", num_documents=8, passages_per_document=2)
    return init(folder / "voice", sources=[writing], settings=settings)


def walk(project: Project, steps: list[str], settings: dict[str, Any]) -> tuple[Story, str]:
    """The story after these steps, and what it said."""
    events: list[Event] = []
    story = Story(project, with_settings(load(project.config_path), {**FAST, **settings}), emit=events.append)
    perform(story, steps)
    return story, "\n".join(event.message for event in events)


def gain(story: Story) -> float:
    """Nats per token that the author's held-out answers became likelier by, mean over documents."""
    test, run = story.test_examples, plan_run(story, 1.0)
    with tuned(story, run.artifact, run.name) as (local, adapter):
        after = nll_per_document(test, score_answers(local, adapter, test))
    before = nll_per_document(test, score_answers(story.local, None, test))
    return sum(before[document] - after[document] for document in before) / len(before)


def losses(story: Story) -> list[float]:
    events = (plan_run(story, 1.0).folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event["data"]["loss"] for event in map(json.loads, events) if event["kind"] == "step"]


def check_training(story: Story, said: str) -> None:
    run, shape = plan_run(story, 1.0), story.local.loaded.shape
    assert run.results["num_trainable"] == num_trainable_parameters(shape, story.config.method)
    artifact = story.project.root / "models" / "voice" / "partial"
    record = read_json(artifact.with_name("model.json"))
    assert record["saved_bytes"] == run.results["saved_bytes"] == sum(path.stat().st_size for path in artifact.iterdir())
    assert f"saved as model 'voice' ({format_bytes(record['saved_bytes'])})" in said
    assert losses(story)[-1] < losses(story)[0] and gain(story) > 0


def test_sparse(project: Project) -> None:
    story, said = walk(project, ["import", "synth", "train", "export"], {"method.name": "sparse", "method.sparse_share": 0.05})
    assert f"chosen by fisher on {len(story.examples_of('train'))} rows" in said and said.count("parity proven") == 1
    check_training(story, said)
    exported = project.root / "exports" / "voice-merged"
    plain = AutoModelForCausalLM.from_pretrained(exported).state_dict()
    trained = load_trained(story.config.model, project.root / "models" / "voice" / "partial", dtype=torch.float32).model.state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in trained.items())
    assert "(method `sparse`)" in (exported / "README.md").read_text(encoding="utf-8")
    # A setting that it does not read trains nothing anew; one that it reads does.
    plans = [
        plan_run(Story(project, with_settings(story.config, {name: value})), 1.0).record["key"]
        for name, value in (("method.adapter_size", 3), ("method.sparse_score", "random"))
    ]
    assert plans[0] == plan_run(story, 1.0).record["key"] != plans[1]
    with pytest.raises(StoryError, match="have no adapter"):
        walk(project, ["export"], {"method.name": "sparse", "method.sparse_share": 0.05, "export.formats": ["adapter"]})


def test_bottleneck(project: Project) -> None:
    settings = {"method.name": "bottleneck", "method.adapter_size": 8}
    story, said = walk(project, ["import", "synth", "train"], settings)
    check_training(story, said)
    with pytest.raises(StoryError, match="model of method `bottleneck` cannot be merged into a plain one"):
        walk(project, ["export"], settings)
    assert isinstance(giong.load(project).write("The ladder was relocated to the yard.", max_new_tokens=8), str)
    served = ServedModels(project, story.config, lambda event: None)
    local, adapter = served.ready(served.entry("voice"))
    expected = load_trained(story.config.model, project.root / "models" / "voice" / "partial", dtype=torch.float32).model
    ids = torch.arange(3, 30)[None]
    with torch.no_grad(), local.using(adapter):
        assert torch.equal(local.loaded.model(ids).logits, expected(ids).logits)
        assert not torch.equal(expected(ids).logits, story.local.loaded.model(ids).logits)
