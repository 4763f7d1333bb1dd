"""`compare-methods` on a small project and a random-weight twin: one row per method, from one evaluation, in their own default rates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import small_writing

from giong.config import load, with_settings
from giong.errors import ConfigError, StoryError
from giong.evaluation.report.methods import HEADER, as_markdown, method_rows
from giong.project import compare_methods, init
from giong.workspace import Project


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Project:
    """Two methods tried; the rate that the settings give belongs to the settings' own method."""
    folder = tmp_path_factory.mktemp("methods")
    settings = {section: dict(values) for section, values in small_writing.SETTINGS.items()}
    settings["model"] = {"name_or_path": str(tiny_folder("llama")), "dtype": "float32", "max_seq_length": 400}
    settings["method"] = {"lora_r": 2}
    settings["train"] |= {"num_epochs": 1, "learning_rate": 2e-3}
    settings["evaluation"] = {"num_bootstrap": 100, "max_requests": 3}
    settings["baselines"] = {"arms": ["base"]}
    writing = small_writing.write_author(folder / "writing", num_documents=8, passages_per_document=2)
    project = init(folder / "voice", sources=[writing], settings=settings)
    from giong.workflow import Story, perform

    perform(Story(project), ["import", "synth", "probe", "baseline"])
    for method, rate in (("lora", 2e-3), ("norm", None)):
        chosen = with_settings(load(project.config_path), {"method.name": method, "train.learning_rate": rate})
        perform(Story(project, chosen), ["method-trial"])
    perform(Story(project), ["compare-methods"])
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
    assert all(len(row) == len(HEADER) for row in rows)
    assert as_markdown(result).splitlines()[1].count("|") == len(HEADER) + 1


def test_the_report_shows_the_table(compared: Project):
    from giong.workflow import Story, perform

    perform(Story(compared), ["report"])
    page = compared.report_path.read_text()
    section = page[page.index('id="methods"') :]
    assert "norm" in section and "<svg" in section[: section.index("</section>")]


def test_an_unknown_method_is_said_before_anything_is_trained(compared: Project):
    with pytest.raises(ConfigError, match="no method 'lorra'.*lora"):
        compare_methods(compared, ["lorra"])


def test_without_a_trial_there_is_nothing_to_compare(tmp_path: Path):
    from giong.workflow import Story, perform

    with pytest.raises(StoryError):
        perform(Story(init(tmp_path / "voice", sources=[])), ["compare-methods"])
