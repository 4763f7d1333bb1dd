"""Pilots on a cheaper sibling: what is trained on which model, what is said before and after, and that nothing is trained twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from end_to_end.test_story import make_project

from giong.config import with_settings
from giong.contracts import Event
from giong.errors import ModelError
from giong.workflow import Story, perform
from giong.workflow.sizing import load_curve
from giong.workspace import read_json


def test_pilots_of_a_sibling_are_announced_carried_over_and_marked(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    model, sibling = (str(tiny_folder(family, max_position_embeddings=1024)) for family in ("qwen2", "llama"))
    project = make_project(tmp_path, model)
    events: list[Event] = []
    story = Story(project, emit=events.append)
    settings = {"train.num_epochs": 1, "train.batch_rows": 8, "train.learning_rate": 1e-3, "sizing.pilot_shares": [0.3, 0.6, 1.0]}
    wrong = Story(project, with_settings(story.config, {"sizing.pilot_model": str(tmp_path / "nowhere")}))
    with pytest.raises(ModelError, match="no model at this path"):
        perform(wrong, ["import", "synth", "size"])
    story.config = with_settings(story.config, {**settings, "sizing.pilot_model": sibling})
    perform(story, ["import", "synth", "size"])
    said = [event.message for event in events if event.kind == "notice" and event.stage == "size"]
    before = [message for message in said if " on slices, about" in message]
    assert [message.split(" on slices, about")[0] for message in before] == [f"3 trainings of {sibling}", f"1 training of {model}"]
    assert any("the shape of the curve is that model's" in message for message in said)
    records = [read_json(folder / "run.json") for folder in project.list_runs()]
    assert sorted((record["base"], record["share"]) for record in records) == sorted(
        [*((sibling, share) for share in (0.3, 0.6, 1.0)), (model, 0.3)]
    )
    result = project.step_result("size")
    assert len(result["runs"]) == 4 and result["curve"]["note"].endswith("at most 2.")
    # At the model's own rows the curve runs through what the model itself was measured at.
    (own_rows,) = {record["num_rows"] for record in records if record["base"] == model}
    curve = load_curve(story)
    assert curve.transfer.own_rows == own_rows == curve.points[0][0]
    assert curve.untuned_nll > curve.points[0][1]
    # Either model was probed once, and the project's own probe is its own model's.
    assert project.step_result("probe")["tokens_per_second"] != project.step_result("probe-pilots")["tokens_per_second"]
    events.clear()
    perform(Story(project, story.config, emit=events.append), ["size"])
    assert not [event for event in events if event.kind == "stage_started"]
