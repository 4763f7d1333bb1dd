"""Steps `method-trial` and `compare-methods`: the same rows and passes through every method, measured by one evaluation.

Each trial is an ordinary run, named by its content, in a worker of its own, so that its peak memory is its own. All methods are
measured on the frozen test side, which a reader may question: the table is there to be read, and whoever picks its best row picks
an optimistic one (its note says so).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from giong import samples
from giong.contracts import Request, ScoreRequest, TokenScores
from giong.errors import StoryError
from giong.evaluation.answers import read_replies, write_replies
from giong.evaluation.results import ArmEvaluation, ArmOutput, finite
from giong.workflow.arms import announce_answers, base_sampling, read_scores, scores_path
from giong.workflow.measuring import measure_arms, prompted_outputs
from giong.workflow.story import Stage, Story, examples_hash
from giong.workflow.training import perform_run, plan_run, score_answers, tuned
from giong.workspace import content_hash, read_json, read_jsonl, write_json, write_jsonl

NOTE = "The best of several methods was chosen and measured on the same requests: its figures are optimistic."


def method_arm(method: str) -> str:
    """The name of a method's arm in the evaluation and of its files."""
    return f"method-{method}"


def trial_path(story: Story, method: str) -> Path:
    return story.project.step_path(method_arm(method))


def general_path(story: Story, method: str) -> Path:
    return story.project.arm_path(f"general-{method_arm(method)}")


def try_method(story: Story) -> None:
    """Train with the settings' method on all rows and let the result answer the test requests; a finished trial is found finished."""
    from giong.engine.score import LocalScorer

    method, test = story.config.method.name, story.test_examples
    arm, run = method_arm(method), plan_run(story, 1.0)
    key = content_hash(run.record["key"], examples_hash(test))
    if story.is_current(arm, key) and run.is_finished:
        return
    perform_run(story, run, arm)
    with Stage(story, arm, f"{len(test)} test requests"), tuned(story, run.artifact, run.name) as (local, adapter):
        announce_answers(story, arm, len(test))
        requests = [Request(example.id, example.messages) for example in test]
        # Greedy and alike for all: sampling settings chosen for one method would favour it.
        replies = local.predictor(arm, adapter, base_sampling(story)).predict(requests, story.progress(arm, "answers"))
        write_replies(story.project, arm, replies)
        write_jsonl(scores_path(story, arm), score_answers(local, adapter, test))
        with local.using(adapter):
            write_jsonl(
                general_path(story, method), LocalScorer(local.loaded).score([ScoreRequest(text) for text in samples.general_texts()])
            )
    made = [story.project.arm_path(arm), scores_path(story, arm), general_path(story, method)]
    results, settings = run.results, run.record["settings"]
    story.project.finish_step(
        arm, key, made,
        {
            "run": run.name, "label": method, "examples_hash": examples_hash(test), "learning_rate": settings["train"]["learning_rate"], "num_epochs": settings["train"]["num_epochs"],
            **{name: results.get(name) for name in ("num_trainable", "saved_bytes", "tokens_per_second", "peak_memory_bytes", "seconds")},
        },
    )  # fmt: skip


def compare_methods(story: Story) -> None:
    """Measure every trial that is there with one evaluation; leaves steps/compare-methods.json with a row per method."""
    from giong.methods import METHODS

    methods = [name for name in METHODS if trial_path(story, name).is_file()]
    if not methods:
        raise StoryError("No method has been tried yet", place=str(story.project.root), remedy="Run `giong compare-methods`.")
    trials = {name: read_json(trial_path(story, name)) for name in methods}
    test = story.test_examples
    key = content_hash({name: trial["key"] for name, trial in trials.items()}, examples_hash(test), story.config.evaluation)
    if story.is_current("compare-methods", key):
        return
    with Stage(story, "compare-methods", f"{len(methods)} methods, {len(test)} test requests"):
        prompts = prompted_outputs(story)
        arms = [
            ArmOutput(method_arm(name), read_replies(story.project, method_arm(name)), uses_training_text=True, label=name)
            for name in methods
        ]
        held_out = {output.name: scores for output in (*prompts, *arms) if (scores := read_scores(story, output.name))}
        evaluation = measure_arms(story, [*prompts, *arms], held_out, _general_scores(story, methods), [arm.name for arm in arms])
    rows = [_row(name, trials[name]["result"], evaluation.arm(method_arm(name))) for name in methods]
    result = {"rows": rows, "num_requests": len(test), "num_documents": evaluation.num_documents, "note": NOTE}
    write_json(story.project.root / "methods.json", finite({**result, "evaluation": evaluation.to_dict()}))
    story.project.finish_step("compare-methods", key, [story.project.root / "methods.json"], finite(result))


def _general_scores(story: Story, methods: Sequence[str]) -> dict[str, list[TokenScores]]:
    from giong.engine.score import LocalScorer

    with story.local.using(None):
        scores = {"base": LocalScorer(story.local.loaded).score([ScoreRequest(text) for text in samples.general_texts()])}
    for name in methods:
        scores[method_arm(name)] = [TokenScores(tuple(row["logprobs"]), row["num_bytes"]) for row in read_jsonl(general_path(story, name))]
    return scores


def _row(method: str, trial: Mapping[str, Any], arm: ArmEvaluation) -> dict[str, Any]:
    """One line of the table: what a method costs, and what it does."""
    return {
        "method": method, **trial,
        "style_gap_closed": asdict(arm.style_gap_closed) if arm.style_gap_closed else None,
        "gain_nats_per_token": asdict(arm.likelihood.gain_nats_per_token) if arm.likelihood and arm.likelihood.gain_nats_per_token else None,
        "key_recall": asdict(arm.key_recall) if arm.key_recall else None, "chrf": asdict(arm.chrf),
        "end_rate": arm.end_rate, "rep_4": arm.rep_4, "forgetting_nats_per_token": arm.gate("forgetting").value,
        "failed_gates": arm.failed_gates,
    }  # fmt: skip
