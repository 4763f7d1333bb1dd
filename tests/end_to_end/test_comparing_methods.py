"""`compare-methods` on a small project and a random-weight twin: a row per method, and one per objective, each table from one evaluation."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import small_writing

from giong.config import load, with_settings
from giong.errors import ConfigError, StoryError
from giong.evaluation.report.methods import as_markdown, header, method_rows
from giong.project import compare_methods, compare_objectives, init
from giong.workspace import Project, write_jsonl


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Project:
    """Two methods and three objectives tried; the rate that the settings give belongs to the settings' own."""
    folder, generator = tmp_path_factory.mktemp("methods"), random.Random(3)
    pairs = [
        {
            "prompt": f"Tell of day {number}.",
            "chosen": small_writing.author_passage(generator),
            "rejected": small_writing.formal_passage(generator, 0),
        }
        for number in range(12)
    ]
    write_jsonl(folder / "pairs.jsonl", pairs)
    settings = {section: dict(values) for section, values in small_writing.SETTINGS.items()}
    settings["model"] = {"name_or_path": str(tiny_folder("llama")), "dtype": "float32", "max_seq_length": 400}
    settings["method"] = {"lora_r": 2}
    settings["train"] |= {"num_epochs": 1, "learning_rate": 2e-3}
    settings["evaluation"] = {"num_bootstrap": 100, "max_requests": 3}
    settings["baselines"] = {"arms": ["base"]}
    settings["data"] |= {"preferences": "../pairs.jsonl"}
    writing = small_writing.write_author(folder / "writing", num_documents=8, passages_per_document=2)
    project = init(folder / "voice", sources=[writing], settings=settings)
    from giong.workflow import Story, perform

    perform(Story(project), ["import", "synth", "probe", "baseline"])
    for method, rate in (("lora", 2e-3), ("norm", None)):
        chosen = with_settings(load(project.config_path), {"method.name": method, "train.learning_rate": rate})
        perform(Story(project, chosen), ["method-trial"])
    for objective, rate in (("sft", 2e-3), ("dpo", None), ("kto", None)):
        chosen = with_settings(load(project.config_path), {"objective.name": objective, "train.learning_rate": rate})
        perform(Story(project, chosen), ["objective-trial"])
    perform(Story(project), ["compare-methods", "compare-objectives"])
    return project


def test_a_row_per_method_with_what_it_costs_and_does(compared: Project):
    rows = {row["method"]: row for row in compared.step_result("compare-methods")["rows"]}
    assert set(rows) == {"lora", "norm"}
    assert rows["lora"]["learning_rate"] == 2e-3 != rows["norm"]["learning_rate"]
    assert rows["lora"]["num_trainable"] > rows["norm"]["num_trainable"] > 0
    assert rows["lora"]["saved_bytes"] > rows["norm"]["saved_bytes"] > 4 * rows["norm"]["num_trainable"]
    for row in rows.values():
        assert row["peak_memory_bytes"] > 50e6
        assert row["gain_nats_per_token"]["low"] <= row["gain_nats_per_token"]["point"] <= row["gain_nats_per_token"]["high"]
    evaluation = json.loads((compared.root / "methods.json").read_text())["evaluation"]
    assert [arm["name"] for arm in evaluation["arms"]] == ["base", "method-lora", "method-norm"]


def test_the_table_has_a_line_per_method(compared: Project):
    result = compared.step_result("compare-methods")
    rows = method_rows(result)
    assert [row[0] for row in rows] == ["lora", "norm"]
    columns = header(result)
    assert all(len(row) == len(columns) for row in rows) and columns[0] == "method" and "tokens" not in columns
    assert as_markdown(result).splitlines()[1].count("|") == len(columns) + 1


def test_every_objective_reads_as_many_tokens_and_is_asked_about_the_held_out_pairs(compared: Project):
    result = compared.step_result("compare-objectives")
    rows = {row["objective"]: row for row in result["rows"]}
    assert list(rows) == ["sft", "dpo", "kto"]
    assert result["num_pairs"] == 2
    # To half a step: a pass is cut at whole pairs.
    assert [row["num_tokens"] for row in rows.values()] == pytest.approx([rows["sft"]["num_tokens"]] * 3, rel=0.1)
    assert rows["sft"]["num_epochs"] == 1.0 != rows["dpo"]["num_epochs"]
    assert rows["sft"]["learning_rate"] == 2e-3 > rows["dpo"]["learning_rate"]
    columns = header(result)
    assert columns[:2] == ["objective", "tokens"] and columns[-2] == "preference accuracy"
    assert [row[0] for row in method_rows(result)] == list(rows)


def test_the_journal_tells_of_both_tables(compared: Project):
    from giong.journal import Journal

    journal = Journal(compared)
    journal.update(load(compared.config_path))
    tried = {entry.step: entry for entry in journal.entries()}
    for kind, names in (("method", ["lora", "norm"]), ("objective", ["sft", "dpo", "kto"])):
        figures = tried[f"compare-{kind}s"].figures
        assert list(figures) == names
        assert all(kind not in row and row["num_tokens"] > 0 for row in figures.values())


def test_the_passes_of_the_budget_by_hand(compared: Project):
    """One pass of sft over its tokens; a pass over pairs reads both answers; four answers to each request are drawn for grpo."""
    from giong.workflow import Story
    from giong.workflow.comparing import passes_of_budget
    from giong.workflow.training import rows_of

    def story(name: str) -> Story:
        return Story(compared, with_settings(load(compared.config_path), {"objective.name": name}))

    def tokens(one: Story) -> int:
        return sum(len(row) for row in rows_of(one, one.learnt_from("train"))[0])

    taught, compares = story("sft"), story("dpo")
    assert passes_of_budget(taught) == 1.0
    assert passes_of_budget(compares) == round(tokens(taught) / tokens(compares), 4)
    assert passes_of_budget(story("grpo")) == 0.25
    assert passes_of_budget(story("ppo")) == 0.0625


def test_the_accuracy_of_preferences_is_against_the_untuned_base(compared: Project):
    from giong.contracts import TokenScores
    from giong.workflow import Story
    from giong.workflow.arms import read_token_scores
    from giong.workflow.comparing import _preference_accuracy, pairs_path

    story = Story(compared)
    own = read_token_scores(pairs_path(story, "objective-dpo"))
    assert len(own) == 4
    assert _preference_accuracy(story, "objective-dpo", own)["point"] == 0.5
    # By hand: the base gives the first pair's chosen answer a nat less than the tuned model, and the second pair's a nat more.
    shifts = (-1.0, 0.0, 1.0, 0.0)
    base = [TokenScores((score.logprobs[0] + shift, *score.logprobs[1:]), score.num_bytes) for score, shift in zip(own, shifts)]
    assert _preference_accuracy(story, "objective-dpo", base)["point"] == 0.5
    assert _preference_accuracy(story, "objective-dpo", [*base[:2], *own[2:]])["point"] == 0.75
    assert _preference_accuracy(story, "objective-dpo", [*own[:2], *base[2:]])["point"] == 0.25


def test_the_report_shows_the_table(compared: Project):
    from giong.workflow import Story, perform

    perform(Story(compared), ["report"])
    page = compared.report_path.read_text()
    for name, row in (("methods", "norm"), ("objectives", "preference accuracy")):
        section = page[page.index(f'id="{name}"') :]
        section = section[: section.index("</section>")]
        assert row in section and "<svg" in section


def test_unknown_names_are_said_before_anything_is_trained(compared: Project):
    with pytest.raises(ConfigError, match="no method 'lorra'.*lora"):
        compare_methods(compared, ["lorra"])
    # A reward model writes nothing that could be measured.
    with pytest.raises(ConfigError, match="no objective 'reward' to compare.*sft"):
        compare_objectives(compared, ["sft", "reward"])


@pytest.mark.parametrize(
    ("settings", "rows", "expected"),
    [
        ({}, None, ["sft", "pretrain", "grpo", "rloo", "ppo"]),
        ({}, [{"prompt": "a", "completion": "b", "label": True}], ["sft", "pretrain", "kto", "grpo", "rloo", "ppo"]),
        (
            {"objective": {"teacher": "there"}},
            [{"prompt": "a", "chosen": "b", "rejected": "c"}],
            ["sft", "pretrain", "dpo", "orpo", "simpo", "kto", "grpo", "rloo", "ppo", "distill"],
        ),
    ],
)
def test_without_names_all_are_tried_that_fit_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict, rows: list[dict] | None, expected: list[str]
):
    project, tried = init(tmp_path / "voice", settings={**settings, **({"data": {"preferences": "rows.jsonl"}} if rows else {})}), []
    write_jsonl(project.root / "rows.jsonl", rows or [])

    def run_story(root: Path, steps: list[str], emit: Callable, *, settings: dict | None = None, **how: object) -> None:
        if steps == ["objective-trial"]:
            tried.append(settings.get("objective.name", "sft"))
        (project.root / "steps").mkdir(exist_ok=True)
        (project.root / "steps" / "compare-objectives.json").write_text('{"result": {}}')

    monkeypatch.setattr("giong.jobs.supervisor.run_story", run_story)
    compare_objectives(project)
    assert tried == expected


def test_without_a_trial_there_is_nothing_to_compare(tmp_path: Path):
    from giong.workflow import Story, perform

    with pytest.raises(StoryError):
        perform(Story(init(tmp_path / "voice", sources=[])), ["compare-methods"])
