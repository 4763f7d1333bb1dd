"""The worked examples run, at a size at which their figures mean nothing."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from giong.config import load
from giong.data.examples import asked_about, frozen_test, read_examples
from giong.data.preferences import read_preferences
from giong.models.folder import BUNDLED_PATH
from giong.workspace import Project, read_jsonl

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are done here: a worker of its own for each call would spend its time on imports."""

    def run_story(root: Path, steps: list[str], emit: Callable, **how: Any) -> None:
        from giong.workflow import Story, perform

        perform(Story(Project(root)), steps)

    monkeypatch.setattr("giong.jobs.supervisor.run_story", run_story)


def small_base(folder: Path) -> Path:
    """A random-weight Llama of one layer that reads as the bundled base does: its tokens are words, which keeps answers short."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(BUNDLED_PATH, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, **small, head_dim=16, initializer_range=0.15)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("in_this_process")
def test_from_votes_to_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES / "votes-to-model")
    monkeypatch.delitem(sys.modules, "votes_to_model", raising=False)
    from votes_to_model import walk

    found = walk(tmp_path, tiny=True, model=str(small_base(tmp_path / "base")))
    project = Project(tmp_path / "voice")
    config = load(project.config_path)
    test = frozen_test(read_examples(project.examples_path), config, project.root)
    # What is measured, before and after, is what nobody voted on.
    assert found["before"]["test requests"] == found["after"]["test requests"] == len(test) > 0
    assert not asked_about(test, config, project.root)
    votes, pairs = read_jsonl(project.root / "votes.jsonl"), read_preferences(project.root / "pairs.jsonl")
    answers = {example.answer for example in read_examples(project.examples_path)}
    assert {vote["rater"] for vote in votes} == {"simulated"} and len(votes) == len(pairs) > 1
    assert all(pair.chosen in answers and pair.rejected not in answers for pair in pairs)
    assert found["reward"]["num_pairs"] >= 1 and 0 <= found["reward"]["accuracy"] <= 1
    # The reference of dpo is the model that it goes on from.
    assert found["dpo"]["loss"] < 0.75
    assert sorted(folder.name for folder in project.list_models()) == ["aligned", "voice"]
    assert (project.root / "models" / "aligned" / "adapter" / "adapter_config.json").is_file()
