"""The replies of a project's arms to the frozen test requests, as the steps `baseline` and `eval` recorded them.

A file of replies does not say which requests it answers; the step's record does, and `answered` asks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from giong.config import ProjectConfig
from giong.contracts import Example, Reply
from giong.data.examples import frozen_test, read_examples
from giong.errors import ConfigError, StoryError
from giong.evaluation.report.table import ARM_LABELS
from giong.evaluation.results import AUTHOR, TUNED
from giong.workspace import Project, content_hash, read_json, read_jsonl, write_jsonl


def prompted_arms(project: Project) -> list[tuple[str, str]]:
    """(name, label) of every prompted arm that has answered, the base first."""
    found = []
    for record in sorted((project.root / "steps").glob("baseline-*.json")):
        name = record.stem.removeprefix("baseline-")
        if project.arm_path(name).is_file():
            found.append((name, read_json(record)["result"]["label"]))
    order = list(ARM_LABELS)
    return sorted(found, key=lambda arm: ("@" in arm[0], order.index(arm[0].partition("@")[0]), arm[0]))


def answered(project: Project, config: ProjectConfig) -> tuple[list[Example], dict[str, str]]:
    """The test requests, and the label by name of every arm whose replies answer exactly these: the prompts, methods that were tried, the
    tuned model, the author.

    Raises StoryError before there are requests, ConfigError for a task without written answers.
    """
    if config.task != "generate":
        raise ConfigError(f"With task {config.task} there are no written answers", place="task", remedy="`giong eval` measures its arms.")
    if not project.examples_path.is_file():
        raise StoryError("There are no requests yet", place=str(project.root), remedy="Run `giong run` first.")
    test = frozen_test(read_examples(project.examples_path), config, project.root)
    arms = [(name, label, f"baseline-{name}") for name, label in prompted_arms(project)]
    trials = sorted(path for kind in ("method", "objective") for path in (project.root / "steps").glob(f"{kind}-*.json"))
    arms += [(path.stem, read_json(path)["result"].get("label", path.stem), path.stem) for path in trials]
    if project.arm_path(TUNED).is_file():
        arms.append((TUNED, ARM_LABELS[TUNED], "eval"))
    asked = content_hash(test)
    current = {name: label for name, label, step in arms if (project.step_result(step) or {}).get("examples_hash") == asked}
    return test, {**current, AUTHOR: ARM_LABELS[AUTHOR]}


def texts_of(project: Project, arm: str, test: Sequence[Example]) -> list[str]:
    """An arm's answers (the author's own, for the author), one per request."""
    return [example.answer for example in test] if arm == AUTHOR else [reply.text for reply in read_replies(project, arm)]


def write_replies(project: Project, arm: str, replies: Sequence[Reply]) -> None:
    """One reply a line, in the order of the requests."""
    write_jsonl(project.arm_path(arm), [asdict(reply) for reply in replies])


def read_replies(project: Project, arm: str) -> list[Reply]:
    """Raises StoryError for an arm that has not answered."""
    path = project.arm_path(arm)
    if not path.is_file():
        raise StoryError(f"The arm {arm!r} has not answered yet", place=str(path), remedy="Run `giong baseline` (or `giong eval`) first.")
    return [Reply(**row) for row in read_jsonl(path)]
