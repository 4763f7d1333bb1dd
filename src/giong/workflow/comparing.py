"""Steps `method-trial` and `compare-methods`: the same rows and passes through every method, measured by one evaluation; and
`objective-trial` and `compare-objectives`: as many tokens through every objective, with one method.

Each trial is an ordinary run, named by its content, in a worker of its own, so that its peak memory is its own. All are measured on
the frozen test side, which a reader may question: the table is there to be read, and whoever picks its best row picks an optimistic
one (its note says so).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

from giong import samples
from giong.config import ObjectiveConfig, with_settings
from giong.config.training import ONLINE
from giong.contracts import Request, ScoreRequest, TokenScores
from giong.engine.score import LocalScorer
from giong.errors import StoryError
from giong.evaluation.answers import read_replies, write_replies
from giong.evaluation.preferences import reward_figures
from giong.evaluation.results import ArmEvaluation, ArmOutput, finite
from giong.methods import METHODS
from giong.sizing.defaults import resolve_training
from giong.workflow.arms import announce_answers, base_sampling, read_scores, read_token_scores, scores_path
from giong.workflow.measuring import measure_arms, prompted_outputs
from giong.workflow.starting import started
from giong.workflow.story import Stage, Story, examples_hash
from giong.workflow.training import perform_run, plan_run, rows_of, score_answers, tuned
from giong.workspace import content_hash, read_json, write_json, write_jsonl

Kind = Literal["method", "objective"]
NAMES: dict[Kind, Sequence[str]] = {
    "method": tuple(METHODS), "objective": get_args(ObjectiveConfig.model_fields["name"].annotation),
}  # fmt: skip
NOTE = "The best of several {}s was chosen and measured on the same requests: its figures are optimistic."


def arm_of(kind: Kind, name: str) -> str:
    """The name of a trial's arm in the evaluation, of its step and of its files."""
    return f"{kind}-{name}"


def general_path(story: Story, arm: str) -> Path:
    return story.project.arm_path(f"general-{arm}")


def pairs_path(story: Story, arm: str) -> Path:
    return story.project.arm_path(f"pairs-{arm}")


def try_method(story: Story) -> None:
    """Train with the settings' method on all rows and let the result answer the test requests; a finished trial is found finished."""
    _try(story, arm_of("method", story.config.method.name), story.config.method.name)


def try_objective(story: Story) -> None:
    """The same with the settings' objective, on as many tokens as `sft` reads in the passes that the settings (or its defaults) ask for."""
    name = story.config.objective.name
    story.config = with_settings(story.config, {"train.num_epochs": passes_of_budget(story)})
    _try(story, arm_of("objective", name), name)


def passes_of_budget(story: Story) -> float:
    """Passes over what the objective learns from that come to the tokens of `sft`; a drawn answer is taken to be as long as the author's."""
    objective, examples = story.config.objective.resolved(), story.training_examples
    method = started(story.project, story.config.method)
    resolved = resolve_training(method, story.config.train, story.local.loaded.shape, len(examples))
    taught = copy(story)
    taught.config = with_settings(story.config, {"objective": {"name": "sft"}})
    budget, own = (rows_of(each, each.learnt_from("train"))[1].num_tokens for each in (taught, story))
    drawn = objective.num_generations * objective.num_updates if objective.name in ONLINE else 1
    return round(resolved.train.num_epochs * budget / max(1, own * drawn), 4)


def _try(story: Story, arm: str, label: str) -> None:
    test, pairs, run = story.test_examples, story.held_out_pairs, plan_run(story, 1.0)
    key = content_hash(run.record["key"], examples_hash(test), *([examples_hash(pairs)] if pairs else []))
    if story.is_current(arm, key) and run.is_finished:
        return
    perform_run(story, run, arm)
    with Stage(story, arm, f"{len(test)} test requests"), tuned(story, run.artifact, run.name) as (local, adapter):
        announce_answers(story, arm, len(test))
        requests = [Request(example.id, example.messages) for example in test]
        # Greedy and alike for all: sampling settings chosen for one would favour it.
        replies = local.predictor(arm, adapter, base_sampling(story)).predict(requests, story.progress(arm, "answers"))
        write_replies(story.project, arm, replies)
        write_jsonl(scores_path(story, arm), score_answers(local, adapter, test))
        with local.using(adapter):
            scorer = LocalScorer(local.loaded)
            write_jsonl(general_path(story, arm), scorer.score([ScoreRequest(text) for text in samples.general_texts()]))
            write_jsonl(pairs_path(story, arm), scorer.score(_asked(story)))
    made = [story.project.arm_path(arm), scores_path(story, arm), general_path(story, arm), pairs_path(story, arm)]
    results, settings = run.results, run.record["settings"]
    story.project.finish_step(
        arm, key, made,
        {
            "run": run.name, "label": label, "examples_hash": examples_hash(test), "learning_rate": settings["train"]["learning_rate"], "num_epochs": settings["train"]["num_epochs"],
            **{name: results.get(name) for name in ("num_trainable", "saved_bytes", "num_tokens", "tokens_per_second", "peak_memory_bytes", "seconds")},
        },
    )  # fmt: skip


def compare_methods(story: Story) -> None:
    """Measure every method's trial that is there with one evaluation; leaves steps/compare-methods.json with a row per method."""
    _compare(story, "method")


def compare_objectives(story: Story) -> None:
    """The same for objectives."""
    _compare(story, "objective")


def _compare(story: Story, kind: Kind) -> None:
    step, test = f"compare-{kind}s", story.test_examples
    found = {name: read_json(path) for name in NAMES[kind] if (path := story.project.step_path(arm_of(kind, name))).is_file()}
    # Another trial answered other requests.
    trials = {name: trial for name, trial in found.items() if trial["result"]["examples_hash"] == examples_hash(test)}
    if not trials:
        raise StoryError(f"No {kind} has been tried yet", place=str(story.project.root), remedy="Run `giong compare-methods`.")
    key = content_hash({name: trial["key"] for name, trial in trials.items()}, examples_hash(test), story.config.evaluation)
    if story.is_current(step, key):
        return
    names = {name: arm_of(kind, name) for name in trials}
    with Stage(story, step, f"{len(trials)} {kind}s, {len(test)} test requests"):
        prompts = prompted_outputs(story)
        arms = [ArmOutput(arm, read_replies(story.project, arm), uses_training_text=True, label=name) for name, arm in names.items()]
        held_out = {output.name: scores for output in (*prompts, *arms) if (scores := read_scores(story, output.name))}
        with story.local.using(None):
            scorer = LocalScorer(story.local.loaded)
            general = {"base": scorer.score([ScoreRequest(text) for text in samples.general_texts()])}
            untuned = scorer.score(_asked(story))
        general |= {arm: read_token_scores(general_path(story, arm)) for arm in names.values()}
        evaluation = measure_arms(story, [*prompts, *arms], held_out, general, list(names.values()))
    rows = [
        {kind: name, **_row(trials[name]["result"], evaluation.arm(arm)), "preference_accuracy": _preference_accuracy(story, arm, untuned)}
        for name, arm in names.items()
    ]
    result = {
        "compared": kind, "rows": rows, "num_requests": len(test), "num_documents": evaluation.num_documents,
        "num_pairs": len(story.held_out_pairs), "note": NOTE.format(kind),
    }  # fmt: skip
    path = story.project.root / f"{kind}s.json"
    write_json(path, finite({**result, "evaluation": evaluation.to_dict()}))
    story.project.finish_step(step, key, [path], finite(result))


def _asked(story: Story) -> list[ScoreRequest]:
    """Both answers of every held-out pair."""
    return [ScoreRequest(answer, pair.messages) for pair in story.held_out_pairs for answer in (pair.chosen, pair.rejected)]


def _preference_accuracy(story: Story, arm: str, untuned: Sequence[TokenScores]) -> dict[str, float] | None:
    """How often a trial has made the preferred answer likelier, against the untuned base, than the other one, ties half; with the interval
    by request. None without held-out pairs.

    That is the implicit reward of Rafailov et al. 2023 (2305.18290, section 4) without its scale, which any model has that writes.
    """
    if not untuned:
        return None
    rewards = [base.nll - own.nll for own, base in zip(read_token_scores(pairs_path(story, arm)), untuned, strict=True)]
    settings, requests = story.config.evaluation, [content_hash(pair.messages) for pair in story.held_out_pairs]
    figures = reward_figures(rewards[::2], rewards[1::2], requests, num_bootstrap=settings.num_bootstrap, seed=settings.seed)
    return {"point": figures["accuracy"], "low": figures["accuracy_low"], "high": figures["accuracy_high"]}


def _row(trial: Mapping[str, Any], arm: ArmEvaluation) -> dict[str, Any]:
    """The rest of a line of the table: what a trial costs, and what it does."""
    return {
        **trial,
        "style_gap_closed": asdict(arm.style_gap_closed) if arm.style_gap_closed else None,
        "gain_nats_per_token": asdict(arm.likelihood.gain_nats_per_token) if arm.likelihood and arm.likelihood.gain_nats_per_token else None,
        "key_recall": asdict(arm.key_recall) if arm.key_recall else None, "chrf": asdict(arm.chrf),
        "end_rate": arm.end_rate, "rep_4": arm.rep_4, "forgetting_nats_per_token": arm.gate("forgetting").value,
        "failed_gates": arm.failed_gates,
    }  # fmt: skip
