"""The story of `task: classify`: import, baseline, train, eval, report, export. Each step reads and writes the project folder.

Texts are passages and lie where a writer's do (`data/passages.jsonl`, `data/split.json`), so the split by document, its freezing and its
removal of copies are the same code. `data/labels.json` holds the label of each; `arms/ARM.jsonl` what each arm says on the test side.

Axis letters: N texts, C labels (1 for a regression).
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import numpy as np

from giong.baselines.labels import bag_of_words, majority, prompted, shots_of
from giong.config import ArmModelConfig, ModelConfig
from giong.contracts import Passage, Predictor, Side
from giong.data.labelled import Labelled, read_labelled
from giong.errors import ConfigError, DataError, StoryError
from giong.evaluation.metrics.classification import figures
from giong.evaluation.results import TUNED
from giong.evaluation.task_arms import compare_arms, confusion
from giong.workflow.importing_rows import import_rows
from giong.workflow.story import Stage, Story
from giong.workspace import content_hash, read_json, read_jsonl, write_json, write_jsonl

ARM_NAMES = {"majority": "most common label (or the mean)", "bag_of_words": "bag of words", TUNED: "fine-tuned"}


class LabelledTexts:
    """What `import` left: the texts of each side with their targets."""

    def __init__(self, story: Story) -> None:
        self._story = story
        path = story.project.data / "labels.json"
        if not path.is_file():
            raise StoryError("Nothing has been imported yet", place=str(story.project.root), remedy="Run `giong import` first.")
        stored = read_json(path)
        self.problem: str = stored["problem"]
        self.names: list[str] = stored["names"]
        self._labels: dict[str, Any] = stored["labels"]

    @cached_property
    def _passages(self) -> dict[str, list[Passage]]:
        split, passages = self._story.split, self._story.passages
        return {side: split.passages(side, passages) for side in ("train", "calibration", "test")}

    def passages(self, side: Side) -> list[Passage]:
        return self._passages[side]

    def texts(self, side: Side) -> list[str]:
        return [passage.text for passage in self._passages[side]]

    def targets(self, side: Side) -> np.ndarray:
        """(N, C): 1 for a text's labels, or its value."""
        labels = [self._labels[passage.id] for passage in self._passages[side]]
        if self.problem == "regression":
            return np.array(labels, dtype=float)[:, None]
        return np.array([[name in label for name in self.names] for label in labels], dtype=float)

    @property
    def key(self) -> str:
        return content_hash(self._story.project.data / "labels.json", self._story.project.passages_path, self._story.project.split_path)


def import_labelled(story: Story) -> None:
    """Read the labelled texts, split them by document, freeze the test side."""
    config = story.config

    def look(found: Labelled) -> tuple[dict[str, Any], str]:
        _check_sides(story, LabelledTexts(story))
        labels = f", labels: {', '.join(found.names)}" if found.names else ""
        return {"problem": found.problem, "names": found.names}, f"{found.problem}{labels}"

    import_rows(
        story, config.classify.model_dump(exclude={"num_shots", "label_smoothing"}), lambda paths: read_labelled(paths, config.data, config.classify),
        story.project.data / "labels.json", lambda found: {"problem": found.problem, "names": found.names, "labels": found.labels}, look,
    )  # fmt: skip


def _check_sides(story: Story, texts: LabelledTexts) -> None:
    if texts.problem == "regression":
        return
    counts = texts.targets("train").sum(0)
    present = [name for name, count in zip(texts.names, counts) if count]
    if len(present) < 2 and texts.problem == "single_label":
        raise DataError(
            f"Every training text has the label {present[0]!r} after the split by document", place="classify.document_field",
            remedy="Add documents, or draw with another data.seed (delete data/split.json).",
        )  # fmt: skip
    if missing := [name for name in texts.names if name not in present]:
        story.notice("import", f"no training text has the label {', '.join(missing)}: it cannot be learnt")


def label_baselines(story: Story) -> None:
    """The most common label, a bag of words, and the generators of `baselines.models` with a few examples of each label."""
    texts, config = LabelledTexts(story), story.config
    train, train_NC, test = texts.texts("train"), texts.targets("train"), texts.texts("test")
    arms = {
        "majority": lambda: (majority(train_NC, len(test), texts.problem), {}),
        "bag_of_words": lambda: (bag_of_words(train, train_NC, test, texts.problem), {}),
    }
    if config.classify.num_shots:
        if texts.problem != "single_label":
            raise ConfigError("A generator is asked for one label only", place="classify.num_shots", remedy="Leave num_shots out.")
        if not config.baselines.models:
            raise ConfigError("No generator is named", place="baselines.models", remedy="Name one there, or leave classify.num_shots out.")
        shots = shots_of(train, train_NC, texts.names, config.classify.num_shots)
        for arm in config.baselines.models:
            arms[f"few_shot@{arm.name}"] = partial(_ask, story, arm, test, texts.names, shots)
    for name, answer in arms.items():
        key = content_hash(texts.key, name, config.classify.num_shots, config.baselines.models if "@" in name else "")
        if story.is_current(f"baseline-{name}", key):
            continue
        with Stage(story, f"baseline-{name}", f"{arm_label(name)}, {len(test)} texts") as stage:
            scores_NC, details = answer()
            write_scores(story, name, scores_NC)
        made = [story.project.arm_path(name)]
        story.project.finish_step(f"baseline-{name}", key, made, {"seconds": stage.seconds, "label": arm_label(name), **details})


def _ask(story: Story, arm: ArmModelConfig, test: list[str], names: list[str], shots: list) -> tuple[np.ndarray, dict[str, Any]]:
    scores_NC, num_unknown = prompted(_generator(story, arm), test, names, shots)
    if num_unknown:
        story.notice(f"baseline-few_shot@{arm.name}", f"{num_unknown} of {len(test)} answers name no label and count for none")
    return scores_NC, {"num_unknown": num_unknown}


def _generator(story: Story, arm: ArmModelConfig) -> Predictor:
    from giong.contracts import Sampling

    if (arm.name_or_path is None) == (arm.remote is None):
        raise ConfigError(
            f"Arm model {arm.name!r} needs either name_or_path or remote", place="baselines.models", remedy="Give exactly one."
        )
    if arm.remote is not None:
        from giong.clients.openai_compatible import RemoteModel
        from giong.clients.reply_journal import ReplyJournal

        journal = ReplyJournal(story.project.arm_path(f"journal@{arm.name}"), arm.remote)
        return RemoteModel(arm.remote, story.ledger, name=arm.name, journal=journal)
    from giong.generation.local import LocalModel
    from giong.models.load import load_model
    from giong.workflow.probing import DTYPES
    from giong.workflow.row_training import dtype_name

    loaded = load_model(ModelConfig(name_or_path=arm.name_or_path), dtype=DTYPES[dtype_name(story)])
    return LocalModel(loaded).predictor(arm.name, None, Sampling(max_new_tokens=16))


def arm_label(name: str) -> str:
    return ARM_NAMES.get(name) or name.replace("few_shot@", "few examples, ")


def write_scores(story: Story, arm: str, scores_NC: np.ndarray) -> None:
    passages = LabelledTexts(story).passages("test")
    rows = [{"id": passage.id, "scores": [float(score) for score in row]} for passage, row in zip(passages, scores_NC, strict=True)]
    write_jsonl(story.project.arm_path(arm), rows)


def train_classifier(story: Story) -> None:
    """Fine-tune the base with a head for the labels, by any method."""
    from giong.models.row_model import RowModel, label_settings, text_rows
    from giong.models.rows import Row
    from giong.objectives import classify
    from giong.workflow.row_training import train_rows

    texts, smoothing = LabelledTexts(story), story.config.classify.label_smoothing
    values, scale = texts.targets("train"), {}
    if texts.problem == "regression":
        # Values are learnt in units of their spread: a head that starts near 0 need not travel to 1900 first.
        scale = {"value_mean": float(values.mean()), "value_spread": float(values.std()) or 1.0}

    def rows_of(loaded: RowModel, side: Side) -> list[Row]:
        passages = texts.passages(side)
        targets_NC = (texts.targets(side) - scale["value_mean"]) / scale["value_spread"] if scale else texts.targets(side)
        rows, cut = text_rows(loaded, texts.texts(side), [passage.id for passage in passages], list(targets_NC))
        if cut:
            story.notice("train", f"{len(cut)} {side} texts are cut to {loaded.max_seq_length} tokens, first: {cut[0]}")
        return rows

    loss = partial(classify.loss, problem=texts.problem, label_smoothing=smoothing)
    settings = {**label_settings(texts.names, texts.problem), **scale}
    train_rows(story, rows_of, loss, settings, content_hash(texts.key, smoothing))


def evaluate_classifier(story: Story) -> None:
    """The tuned model labels the test side; every arm is measured with intervals by document, and the verdict is given."""
    from giong.models.row_model import answers
    from giong.workflow.row_training import row_outputs, trained_model

    texts = LabelledTexts(story)
    arms = [path.stem.removeprefix("baseline-") for path in sorted((story.project.root / "steps").glob("baseline-*.json"))]
    arms = [name for name in [*list(ARM_NAMES)[:2], *arms] if story.project.arm_path(name).is_file()]
    if not arms:
        raise StoryError("No baseline has answered yet", place=str(story.project.root), remedy="Run `giong baseline` first.")
    arms = list(dict.fromkeys(arms))
    record = (story.project.step_record("model") or {}).get("key", "")
    key = content_hash(texts.key, record, story.config.evaluation, *(story.project.arm_path(name) for name in arms))
    if story.is_current("eval", key):
        return
    loaded, record = trained_model(story)
    with Stage(story, "eval", f"{len(arms) + 1} arms, {len(texts.passages('test'))} texts") as stage:
        write_scores(story, TUNED, answers(loaded.model.config, row_outputs(loaded, texts.texts("test"))))
        scores = {name: read_scores(story, name) for name in [*arms, TUNED]}
        targets_NC = texts.targets("test")
        result = compare_arms(
            {name: figures(arm_NC, targets_NC, texts.problem) for name, arm_NC in scores.items()},
            [passage.document_id for passage in texts.passages("test")], tuned=TUNED, labels={name: arm_label(name) for name in scores},
            num_bootstrap=story.config.evaluation.num_bootstrap, seed=story.config.evaluation.seed,
        )  # fmt: skip
        if texts.problem == "single_label":
            result["confusion"] = confusion(scores[TUNED], targets_NC)
    result |= {"task": story.config.task, "problem": texts.problem, "names": texts.names, "seconds": stage.seconds}
    write_json(story.project.root / "evaluation.json", result)
    made = [story.project.root / "evaluation.json", story.project.arm_path(TUNED)]
    story.project.finish_step("eval", key, made, {**result["verdict"], "seconds": stage.seconds})


def read_scores(story: Story, arm: str) -> np.ndarray:
    return np.array([row["scores"] for row in read_jsonl(story.project.arm_path(arm))])
