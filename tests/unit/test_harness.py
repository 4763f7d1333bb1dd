"""Tasks of lm-evaluation-harness: what is refused before anything runs, figures by hand, and (where it is installed) the harness itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import small_writing
from answered_project import make_answered

from giong.config import EvaluationConfig, ModelConfig, with_settings
from giong.contracts import Event, ScoreRequest
from giong.errors import ConfigError
from giong.evaluation.report import ReportContent
from giong.evaluation.report.checks import task_losses, task_rows, tasks_line
from giong.evaluation.results import finite
from giong.project import init
from giong.workflow import Story, harness, perform
from giong.workspace import Project, read_json

needs_the_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed (extra lm-eval)")
SUMS = [{"question": f"{a} and {b} make", "choices": [f" {a + b}", f" {a + b + 1}"], "gold": 0} for a in range(4) for b in range(3)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    made = make_answered(tmp_path_factory.mktemp("harness") / "voice")
    data = made.root / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    task = {
        "task": "sums", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(made.root / "cache")},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "gold",
        "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (made.root / "sums.yaml").write_text(json.dumps(task))
    return made


def story_of(project: Project, *tasks: str, **settings: object) -> Story:
    story = Story(project)
    story.config = with_settings(story.config, {"evaluation.lm_eval_tasks": list(tasks), **settings})
    return story


def test_what_cannot_be_asked_is_said_before_anything_runs(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    assert harness.load_tasks(story_of(project)) == {}
    with pytest.raises(ConfigError, match="does not see a soft prompt"):
        harness.load_tasks(story_of(project, "sums.yaml", **{"method.name": "prompt_tuning"}))
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="not installed") as caught:
        harness.load_tasks(story_of(project, "sums.yaml"))
    assert "pip install 'giong[lm-eval]'" in caught.value.remedy


def test_differences_are_paired_by_document() -> None:
    before, after = np.array([1.0, 0.0] * 20), np.array([1.0, 0.0] * 18 + [0.0] * 4)
    found = harness.compare_tasks({"sums": ("acc", before)}, {"sums": ("acc", after)}, EvaluationConfig(num_bootstrap=400))["sums"]
    assert (found["metric"], found["num_documents"]) == ("acc", 40)
    assert [found[name].point for name in ("base", "fine_tuned", "difference")] == pytest.approx([0.5, 0.45, -0.05])
    # Unpaired, the difference of two such means would be uncertain by 0.2.
    assert found["difference"].high - found["difference"].low < 0.15
    lost = harness.compare_tasks({"sums": ("acc", before)}, {"sums": ("acc", 0 * before)}, EvaluationConfig(num_bootstrap=400))
    content = ReportContent("voice", "2026-01-01", tasks=finite({"kept": found, **lost}))
    assert task_losses(content) == ["sums"]
    assert task_rows(content)[0][:2] == ["kept, acc", "40"]
    assert task_rows(content)[0][4].startswith("-0.050 [")
    assert tasks_line({}) == ""
    assert "base and tuned: kept (acc, 40 documents) 0.500 and 0.450, difference -0.050 [" in tasks_line(content.tasks)


@needs_the_harness
def test_the_harness_scores_as_the_likelihoods_say(project: Project, tiny_folder: Callable[..., Path]) -> None:
    from giong.engine.score import LocalScorer
    from giong.models.load import load_model

    story = story_of(project, "sums.yaml", **{"evaluation.lm_eval_limit": 10})
    loaded = load_model(ModelConfig(name_or_path=str(tiny_folder("llama"))))
    padding = loaded.tokenizer.pad_token
    metric, values = harness.task_scores(story, loaded, harness.load_tasks(story))["sums"]
    assert loaded.tokenizer.pad_token == padding
    assert metric == "acc"
    texts = [[row["question"] + choice for choice in row["choices"]] for row in SUMS[:10]]
    # Of a whole text the question is a common part, and the sign of the end is left out.
    scores = [[sum(LocalScorer(loaded).score([ScoreRequest(text)])[0].logprobs[:-1]) for text in pair] for pair in texts]
    assert values.tolist() == [float(right > wrong) for right, wrong in scores]
    assert 0 < values.sum() < 10


@needs_the_harness
def test_data_that_only_the_network_has_are_named(project: Project) -> None:
    path = project.root / "far.yaml"
    path.write_text((project.root / "sums.yaml").read_text().replace('"json"', '"somebody/somewhere"').replace('"sums"', '"far"'))
    with pytest.raises(ConfigError, match="The task 'far.yaml' cannot be loaded: .*somebody/somewhere") as caught:
        harness.load_tasks(story_of(project, "far.yaml"))
    assert "fetched once where there is a network" in caught.value.remedy
    with pytest.raises(ConfigError, match="There is no task 'gone.yaml'"):
        harness.load_tasks(story_of(project, "gone.yaml"))


@needs_the_harness
def test_a_whole_evaluation_asks_the_tasks_and_again_when_they_change(
    project: Project, tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From writing to a verdict, in small; the data file is named relative to giong.yaml, wherever giong runs."""
    settings = small_writing.SETTINGS | {
        "model": {"name_or_path": str(tiny_folder("llama")), "dtype": "float32"},
        "baselines": {"arms": ["base"], "likelihood": False},
        "sampling": {"temperature": 0.0},
        "evaluation": {
            "background": str(small_writing.write_background(tmp_path / "background.jsonl")), "max_requests": 4, "num_bootstrap": 200,
            "probes_per_kind": 0, "lm_eval_tasks": ["sums.yaml"], "lm_eval_limit": 11,
        },
    }  # fmt: skip
    writing = small_writing.write_author(tmp_path / "writing", num_documents=6, passages_per_document=2)
    made = init(tmp_path / "voice", sources=[writing], settings=settings)
    task = (project.root / "sums.yaml").read_text().replace(str(project.root / "sums.jsonl"), "sums.jsonl")
    (made.root / "sums.yaml").write_text(task)
    (made.root / "sums.jsonl").write_text((project.root / "sums.jsonl").read_text())
    monkeypatch.chdir(tmp_path)
    events: list[Event] = []
    perform(Story(made, emit=events.append), ["import", "synth", "baseline", "train", "eval"])
    assert "tasks of lm-evaluation-harness: sums" in [event.message for event in events]
    found = read_json(made.root / "evaluation.json")["tasks"]["sums"]
    assert (found["metric"], found["num_documents"]) == ("acc", 11)
    assert found["difference"]["point"] == pytest.approx(found["fine_tuned"]["point"] - found["base"]["point"])
    # With every right answer made a wrong one, so is the score (of 11, never a half); nothing of the project itself has changed.
    (made.root / "sums.jsonl").write_text("".join(json.dumps({**row, "gold": 1}) + "\n" for row in SUMS))
    perform(Story(made), ["eval"])
    assert read_json(made.root / "evaluation.json")["tasks"]["sums"]["base"]["point"] == pytest.approx(1 - found["base"]["point"])
