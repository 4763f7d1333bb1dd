"""The story as one readable function per step, in the order of STEPS. Each step reads and writes the project folder.

Modules that compute with torch are imported by the step that needs them, so importing and synthesis start at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from giong.clients.openai_compatible import api_key
from giong.config import ProjectConfig
from giong.config.json_schema import read_schema
from giong.contracts import TASK_STEPS, TRAINING_STEPS
from giong.data.examples import asked_about
from giong.errors import ConfigError, DataError, ModelError
from giong.sizing.moving import SOFT_PROMPTS, check_anchor, check_method
from giong.sizing.shapes import shape_from_config
from giong.workflow.harness import load_tasks
from giong.workflow.journalling import bring_up_to_date, kept_in_journal
from giong.workflow.other_models import check_other_models, measuring_models
from giong.workflow.questioning import questions_of
from giong.workflow.starting import started
from giong.workflow.story import Story
from giong.workspace import read_json

__all__ = ["STEPS", "Story", "perform"]


def _import(story: Story) -> None:
    from giong.workflow.writing import import_writing

    import_writing(story)


def _synth(story: Story) -> None:
    from giong.workflow.writing import synthesise_requests

    synthesise_requests(story)


def _baseline(story: Story) -> None:
    from giong.workflow.arms import answer_baselines

    answer_baselines(story)


def _size(story: Story) -> None:
    from giong.workflow.sizing import size_opportunity

    size_opportunity(story)


def _train(story: Story) -> None:
    if story.config.objective.name == "reward":
        from giong.workflow.rewarding import train_reward_model

        train_reward_model(story)
        return
    from giong.workflow.training import train_model

    train_model(story)


def _sweep(story: Story) -> None:
    from giong.workflow.sweeping import sweep

    sweep(story)


def _eval(story: Story) -> None:
    from giong.workflow.measuring import evaluate_model

    evaluate_model(story)


def _report(story: Story) -> None:
    from giong.workflow.reporting import write_story_report

    write_story_report(story)


def _export(story: Story) -> None:
    from giong.workflow.exporting import export_model

    export_model(story)


def _merge_adapters(story: Story) -> None:
    from giong.workflow.adding import merge_adapters

    merge_adapters(story)


def _probe(story: Story) -> None:
    from giong.workflow.probing import probe

    probe(story)


def _later(module: str, function: str) -> Callable[[Story], None]:
    return lambda story: getattr(import_module(f"giong.workflow.{module}"), function)(story)


STEPS: dict[str, Callable[[Story], None]] = {
    "import": _import,
    "synth": _synth,
    "probe": _probe,
    "baseline": _baseline,
    "size": _size,
    "train": _train,
    "sweep": _sweep,
    "method-trial": _later("comparing", "try_method"),
    "compare-methods": _later("comparing", "compare_methods"),
    "objective-trial": _later("comparing", "try_objective"),
    "compare-objectives": _later("comparing", "compare_objectives"),
    "eval": _eval,
    "report": _report,
    "export": _export,
    "merge-adapters": _merge_adapters,
}


CLASSIFY_STEPS: dict[str, Callable[[Story], None]] = {
    "import": _later("classifying", "import_labelled"),
    "baseline": _later("classifying", "label_baselines"),
    "train": _later("classifying", "train_classifier"),
    "eval": _later("classifying", "evaluate_classifier"),
    "report": _later("row_training", "report_task"),
    "export": _later("exporting", "export_row_model"),
}

EMBED_STEPS: dict[str, Callable[[Story], None]] = {
    "import": _later("embedding", "import_pairs"),
    "baseline": _later("embedding", "retrieve_untuned"),
    "train": _later("embedding", "train_embedder"),
    "eval": _later("embedding", "evaluate_embedder"),
    "report": _later("row_training", "report_task"),
    "export": _later("exporting", "export_row_model"),
}

MLM_STEPS: dict[str, Callable[[Story], None]] = {
    "import": _import,
    "train": _later("masking", "train_masked"),
    "eval": _later("masking", "evaluate_masked"),
    "report": _later("row_training", "report_task"),
    "export": _later("exporting", "export_row_model"),
}

STEPS_OF_TASK = {"generate": STEPS, "classify": CLASSIFY_STEPS, "embed": EMBED_STEPS, "mlm": MLM_STEPS}

COMPUTING = TRAINING_STEPS | {"baseline", "compare-methods", "compare-objectives", "eval", "export"}
"""Steps that load the model and need requests."""


def perform(story: Story, steps: Sequence[str] = ()) -> None:
    """Do these steps (by default those of the task) in order. Raises ConfigError for an unknown one; everything finished stays on disk."""
    task = story.config.task
    known, steps = STEPS_OF_TASK[task], steps or TASK_STEPS[task]
    for step in steps:
        if step not in known:
            of = "" if task == "generate" else f" with task: {task}"
            raise ConfigError(f"There is no step {step!r}{of}", remedy=f"Steps: {', '.join(known)}.")
    check_beforehand(story, steps)
    bring_up_to_date(story)
    for step in steps:
        story.check_stop()
        with kept_in_journal(story, step):
            known[step](story)


def check_beforehand(story: Story, steps: Sequence[str]) -> None:
    """Say at once what would otherwise be found after the seconds of an import or the money of a synthesis.

    Raises ModelError for a folder that cannot be loaded safely, ConfigError for a provider's missing key and for a method that has nothing
    to train there or no start to be pulled to, StoryError where the requests are missing and not asked for, DataError for a question set
    that is none.
    """
    from giong.models.folder import check_model

    if set(steps) & COMPUTING:
        folder = check_model(story.config.model)
        if "size" in steps and (sibling := story.config.sizing.pilot_model):
            check_model(story.with_model(sibling).config.model)
        if "size" in steps and (remote := story.config.sizing.pilot_remote):
            api_key(remote)
        if set(steps) & TRAINING_STEPS:
            check_anchor(story.config.method, story.config.train)
            _check_files(story)
            check_other_models(story.project, story.config.objective, folder)
        if set(steps) & TRAINING_STEPS and story.config.method.name in SOFT_PROMPTS and "merged" in (story.config.export.formats or ()):
            raise ConfigError(
                f"A soft prompt ({story.config.method.name}) cannot be merged into the weights", place="export.formats",
                remedy="Leave `merged` out, or train with lora.",
            )  # fmt: skip
        if story.config.task != "generate":
            if story.config.method.start_from is not None:
                raise ConfigError(
                    f"With task: {story.config.task} no run goes on from an adapter", place="method.start_from", remedy="Leave it out."
                )
            return
        if "eval" in steps:
            questions_of(story)
            read_schema(story.config.evaluation.json_schema, story.project.root)
            measuring_models(story.project, story.config.evaluation)
            load_tasks(story)
        method = started(story.project, story.config.method) if set(steps) & TRAINING_STEPS else story.config.method
        if folder and set(steps) & TRAINING_STEPS:
            # A family without formulas is counted, and checked, when it is loaded.
            with contextlib.suppress(ModelError):
                check_method(shape_from_config(read_json(folder / "config.json")), method)
        if "sweep" in steps:
            _check_sweep(story.config)
        if story.config.objective.learns_from != "examples" and set(steps) & TRAINING_STEPS:
            num_pairs = {side: len(pairs) for side, pairs in story.preferences.items()}
            story.notice(
                "train", f"{num_pairs['train']} {story.config.objective.learns_from} to learn from, {num_pairs['calibration']} held out"
            )
        if story.config.data.preferences and set(steps) & (TRAINING_STEPS | {"eval"}) and not story.config.evaluation.exclude_preferences:
            _say_what_was_seen(story)
        # Pairs can be learnt from without any writing of the author's.
        if "synth" not in steps and (set(steps) & COMPUTING != {"train"} or story.config.objective.learns_from == "examples"):
            story.check_examples()


def _check_sweep(config: ProjectConfig) -> None:
    """Raise ConfigError where trials could not be ranked. Settings of sampling are ranked by what is kept of a request."""
    only_sampling = bool(config.sweep.parameters) and all(name.startswith("sampling.") for name in config.sweep.parameters)
    if config.objective.other_aim and not (only_sampling and config.objective.learns_from == "examples"):
        raise ConfigError(
            f"A sweep has nothing to choose by: {config.objective.other_aim}", place="objective.name",
            remedy="Sweep with sft, or train with each setting and compare the evaluations.",
        )  # fmt: skip


def _say_what_was_seen(story: Story) -> None:
    test = story.test_examples if story.project.examples_path.is_file() else []
    seen = asked_about(test, story.config, story.project.root)
    if num_seen := sum(example.document_id in seen for example in test):
        story.notice(
            "eval",
            f"{num_seen} of {len(test)} test requests are of documents that data.preferences asks about: what learns from it has seen their "
            "answers (evaluation.exclude_preferences: true measures on the others)",
        )


def _check_files(story: Story) -> None:
    train = story.config.train
    for name, path in (("train.replay_path", train.replay_path), ("train.pseudo.requests", train.pseudo and train.pseudo.requests)):
        if path and not (story.project.root / Path(path).expanduser()).exists():
            raise DataError(
                f"There is no file or folder {path!r}", place=f"{story.project.config_path}: {name}", remedy="Correct it or leave it out."
            )
