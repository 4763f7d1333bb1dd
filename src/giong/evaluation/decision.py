"""The verdict of an evaluation that lies on disk, given again when the answers of the questionnaire have changed.

What was measured stays: asking the models again because a person changed an answer would be a waste.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from giong.config import AdviceConfig, ProjectConfig
from giong.config.editing import with_written
from giong.evaluation.results import finite
from giong.sizing.advice import advise
from giong.sizing.questions import Language
from giong.sizing.verdict import Evidence, Verdict
from giong.workspace import Project, read_json, write_json


def answers_given(config: ProjectConfig) -> AdviceConfig:
    """Section `advice`, with a recorded consent as the answer to whether the person may be imitated."""
    answers = config.advice
    if answers.may_imitate is None and config.data.consent.granted:
        return answers.model_copy(update={"may_imitate": True})
    return answers


def write_answers(project: Project, answers: Mapping[str, Any]) -> None:
    """Put answers into section `advice` of giong.yaml; everything else in it stays. Raises ConfigError where it cannot be edited."""
    settings = {f"advice.{name}": value for name, value in answers.items()}
    project.edit_config(lambda text: with_written(text, settings, place=str(project.config_path)))


def decide_again(project: Project, config: ProjectConfig, language: Language = "en") -> Verdict | None:
    """The verdict with the present answers; in English it is written down. None before an evaluation with its evidence."""
    path = project.root / "evaluation.json"
    stored = read_json(path) if path.is_file() else {}
    record = project.step_record("eval")
    if "evidence" not in stored or record is None:
        return None
    verdict = advise(Evidence.from_dict(stored["evidence"]), answers_given(config), language)
    said = finite(verdict.to_dict())
    if language == "en" and said != stored["verdict"]:
        write_json(path, {**stored, "verdict": said})
        result = {**record["result"], "decision": verdict.decision, "reason": verdict.reason}
        write_json(project.step_path("eval"), {**record, "result": result})
    return verdict
