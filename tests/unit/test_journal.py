"""The journal: entries read off a project's records, once each; failures; and that nobody's own words are ever lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from answered_project import make_answered
from command_line import giong
from test_report import page

import giong as package
from giong import errors
from giong.config import load
from giong.contracts import Event
from giong.errors import DataError, Interrupted, StoryError, TrainingError
from giong.journal import Journal, markdown
from giong.journal.summary import AFTER_VERDICT
from giong.sizing.verdict import Decision
from giong.workflow.journalling import kept_in_journal
from giong.workflow.story import Story
from giong.workspace import Project, read_jsonl, write_json


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_answered(tmp_path_factory.mktemp("journal") / "voice")


@pytest.fixture
def project(made: Project, tmp_path: Path) -> Project:
    shutil.copytree(made.root, tmp_path / "voice")
    return Project(tmp_path / "voice")


def add_run(project: Project, name: str, *, finished: bool = True, **changes: Any) -> None:
    """A run as training leaves it: settings and, if finished, results."""
    folder = project.run_path(name)
    settings = {"method": {"name": "lora", "lora_r": 8}, "train": {"learning_rate": 2e-4, "seed": 0}, "dtype": "float32", **changes}
    write_json(folder / "run.json", {"key": name, "num_rows": 88, "share": 1.0, "base": "giong-tiny", "settings": settings})
    if finished:
        write_json(folder / "results.json", {"num_steps": 40, "final_loss": 2.312345, "seconds": 75.0, "num_trainable": 1000})


def update(project: Project) -> Journal:
    journal = Journal(project)
    journal.update(load(project.config_path))
    return journal


def snapshot(journal: Journal) -> tuple[bytes, bytes]:
    return journal.path.read_bytes(), journal.data_path.read_bytes()


# What is entered


def test_every_record_is_entered_once(project: Project) -> None:
    add_run(project, "rows-88")
    journal = update(project)
    tried = {entry.step: entry for entry in journal.entries() if entry.kind == "tried"}
    assert set(tried) == {"baseline-base", "baseline-few_shot", "eval", "train"}
    run = tried["train"]
    assert (run.run, run.seconds, run.figures["final_loss"], run.settings["train.learning_rate"]) == ("rows-88", 75.0, 2.3123, 2e-4)
    assert "| train rows-88 | method.name lora, method.lora_r 8, train.learning_rate 0.0002, train.seed 0 |" in journal.markdown()
    before = snapshot(journal)
    update(project)
    assert snapshot(journal) == before
    # Done again with other settings or by force: another attempt.
    add_run(project, "rows-88-b", train={"learning_rate": 1e-3})
    record = json.loads(project.step_path("baseline-base").read_text())
    write_json(project.step_path("baseline-base"), {**record, "result": {**record["result"], "seconds": 3.0}})
    update(project)
    steps = [entry.step for entry in journal.entries() if entry.kind == "tried"]
    assert (steps.count("train"), steps.count("baseline-base"), steps.count("baseline-few_shot")) == (2, 2, 1)
    # What a refusal of the disk kept from JOURNAL.md is made up for.
    whole = snapshot(journal)
    journal.path.write_bytes(before[0])
    update(project)
    assert snapshot(journal) == whole
    # A run that was deleted stays tried.
    shutil.rmtree(project.run_path("rows-88"))
    update(project)
    assert "rows-88 |" in journal.markdown()


def test_a_verdict_is_learnt_and_says_what_comes_next(project: Project) -> None:
    from typing import get_args

    assert set(AFTER_VERDICT) == set(get_args(Decision))
    assert update(project).to_dict()["next"][0]["text"] == "`giong import`"
    for step in ("import", "synth", "size"):
        project.finish_step(step, "key", [], {})
    # A trained run is no model before it is saved as one.
    add_run(project, "rows-88")
    assert update(project).to_dict()["next"][0]["text"] == "`giong train`"
    project.finish_step("model", "key", [], {})
    project.finish_step("eval", "other", [], {"decision": "no-go", "reason": "It fails a gate (collapse).", "seconds": 2.0})
    parts = update(project).to_dict()
    assert parts["next"][0]["text"] == AFTER_VERDICT["no-go"]
    assert parts["learnt"][-1]["text"] == "Verdict: no-go. It fails a gate (collapse)."
    assert all(row["done"] for row in parts["plan"])


def test_a_failure_is_entered_with_its_sentence_and_settings_once(project: Project) -> None:
    said: list[Event] = []
    story = Story(project, emit=said.append)

    def fail(error: Exception, **run: Any) -> None:
        with pytest.raises(type(error)), kept_in_journal(story, "train"):
            if run:
                add_run(project, finished=False, **run)
            raise error

    diverged = TrainingError("The loss is not finite at step 3", place="train", remedy="Lower train.learning_rate.")
    fail(diverged, name="rows-88", train={"learning_rate": 1.0})
    fail(diverged, name="rows-88", train={"learning_rate": 1.0})
    journal = Journal(project)
    failed = [entry for entry in journal.entries() if entry.status == "failed"]
    assert [(entry.step, entry.run, entry.text, entry.settings["train.learning_rate"]) for entry in failed] == [
        ("train", "rows-88", "The loss is not finite at step 3 (train). Lower train.learning_rate.", 1.0)
    ]
    assert journal.to_dict()["next"][0]["text"].startswith("Mend what stopped train, then `giong run`: The loss")
    # With other settings it is another attempt; a stop and a step asked for too early are none.
    fail(diverged, name="rows-88-b", train={"learning_rate": 0.5})
    fail(Interrupted("Stopped"))
    fail(StoryError("Too early"))
    fail(IndexError("list index out of range"))
    assert [entry.text for entry in journal.entries() if entry.status == "failed"][1:] == [str(diverged), "list index out of range"]
    assert not said


def test_a_journal_that_cannot_be_written_stops_nothing(project: Project) -> None:
    said: list[Event] = []
    journal = update(project)
    journal.path.write_bytes(b"caf\xe9 is mine\n")
    add_run(project, "rows-88")
    with kept_in_journal(Story(project, emit=said.append), "train"):
        pass
    assert "not UTF-8" in said[0].message
    assert journal.path.read_bytes() == b"caf\xe9 is mine\n"
    journal.data_path.write_text('{"kind": "tried", "colour": "red"}\n')
    with pytest.raises(DataError, match="colour"):
        journal.entries()


# The person's own words


def survives_everywhere(project: Project) -> list[int]:
    """Lines of JOURNAL.md behind which a person's sentence would be lost by the next two writings."""
    journal, mine = Journal(project), "This sentence is mine."
    original, data = snapshot(journal)
    lines = original.decode().splitlines()
    lost = []
    for number in range(len(lines) + 1):
        journal.path.write_text("\n".join([*lines[:number], mine, *lines[number:]]) + "\n", encoding="utf-8")
        journal.add("a note")
        journal.add("another", "learnt")
        if mine not in journal.path.read_text(encoding="utf-8").splitlines():
            lost.append(number)
        journal.path.write_bytes(original)
        journal.data_path.write_bytes(data)
    return lost


def test_a_sentence_survives_wherever_it_is_written(project: Project) -> None:
    add_run(project, "rows-88")
    update(project).add("kept", "next")
    assert survives_everywhere(project) == []


def test_the_law_would_see_a_lost_sentence(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    update(project)
    monkeypatch.setattr(markdown, "content_hash", lambda body: "0" * 16)
    update(project).add("all marks the same, so that no edit is seen")
    assert survives_everywhere(project)


def test_text_headings_and_marks_may_be_changed(project: Project) -> None:
    journal = update(project)
    text = journal.markdown()
    # A heading renamed, words changed inside a block, a block thrown away, a mark left alone, text after the end without a line break.
    text = text.replace("## Goal", "## What for").replace("Make giong-tiny write", "Let giong-tiny write")
    start, end = text.index("<!-- giong: plan"), text.index("## What was tried")
    text = text[:start] + "My own plan.\n\n" + text[end:] + "<!-- giong: goal 0123456789abcdef -->\nP.S. <b>bold</b>"
    journal.path.write_text(text, encoding="utf-8")
    journal.add("first line\nsecond <!-- giong: end --> line")
    after = journal.markdown()
    assert [
        part
        for part in ("## What for", "Let giong-tiny write", "Make giong-tiny write", "My own plan.", "P.S. <b>bold</b>")
        if part not in after
    ] == []
    assert after.count("\n## Plan\n") == 2
    assert "second &lt;!-- giong: end --> line" in after
    assert journal.to_dict()["handwritten"].startswith("## What for")
    assert "P.S. <b>bold</b>" in journal.to_dict()["handwritten"]
    # And from then on nothing moves any more.
    update(project)
    journal.path.unlink()
    update(project)
    assert "second &lt;!-- giong: end --> line" in journal.markdown()


def test_another_task_has_a_plan_of_its_own(project: Project) -> None:
    with project.config_path.open("a", encoding="utf-8") as stream:
        stream.write("task: classify\n")
    parts = update(project).to_dict()
    assert [row["text"] for row in parts["plan"]] == ["import", "baseline", "train", "eval"]
    with pytest.raises(errors.ConfigError, match="no written answers"):
        package.compare(project)


def test_people_write_into_every_part(project: Project) -> None:
    journal = package.Journal(project)
    for kind in ("goal", "plan", "tried", "learnt", "next", "note"):
        journal.add(f"about {kind}", kind)
    parts = journal.to_dict()
    assert {name: [row["text"] for row in rows if row["by"] == "person"] for name, rows in parts.items() if name != "handwritten"} == {
        name: [f"about {'note' if name == 'notes' else name}"] for name in ("goal", "plan", "tried", "learnt", "next", "notes")
    }
    assert all(f"about {kind}" in journal.markdown() for kind in ("goal", "plan", "tried", "learnt", "next", "note"))
    for text, kind in (("x", "wish"), (" ", "note")):
        with pytest.raises(errors.ConfigError):
            journal.add(text, kind)


# Command line and report


def test_the_command_line_writes_and_prints_it(project: Project) -> None:
    here = ("--project", project.root)
    giong("journal", *here).refused(StoryError, "no journal yet", str(project.root))
    failed = giong("import", *here)
    sentence = failed.told.split("giong: ")[1].strip()
    assert failed.code == errors.ConfigError.exit_code
    giong("import", *here)
    tried = [row for row in read_jsonl(project.root / "journal.jsonl") if row["status"] == "failed"]
    assert [(row["step"], row["text"]) for row in tried] == [("import", sentence)]
    giong("journal", "add", "Ask Ann for her letters", "--to", "next", *here).worked()
    assert "- Ask Ann for her letters" in giong("journal", *here).worked().out
    told = json.loads(giong("journal", *here, "--json").worked().out)
    assert [row["text"] for row in told["next"]][1:] == ["Ask Ann for her letters"]
    giong("journal", "add", "x", "--to", "wish", *here).refused(errors.ConfigError, "'wish'", "goal, plan")


def test_the_report_shows_it(project: Project) -> None:
    from giong.workflow.reporting import journal_content

    add_run(project, "rows-88")
    journal = update(project)
    journal.add("<b>learnt by hand</b>", "learnt")
    journal.path.write_text(journal.markdown() + "\nWritten <i>freely</i>.\n", encoding="utf-8")
    words = page(journal=journal_content(Story(project))).one_line()
    for part in ("<b>learnt by hand</b>", "Written <i>freely</i>.", "train rows-88", "Make giong-tiny write like Ann (voice)."):
        assert part in words
