"""Step `baseline`: every way of prompting, on the frozen test requests, with every model that the settings name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from giong.baselines import BASELINES, Prompted
from giong.clients.openai_compatible import RemoteModel
from giong.clients.reply_journal import ReplyJournal
from giong.config import ArmModelConfig, ModelConfig
from giong.contracts import Example, Message, Predictor, Request, Sampling, Scorer, ScoreRequest, TokenScores
from giong.engine.score import LocalScorer
from giong.errors import ConfigError, StoryError
from giong.evaluation.answers import write_replies
from giong.evaluation.report.table import ARM_LABELS
from giong.sizing.estimate import estimate_generation
from giong.sizing.units import format_bytes, format_cost, format_seconds
from giong.workflow.story import Stage, Story, examples_hash
from giong.workspace import content_hash, read_jsonl, write_jsonl


@dataclass(frozen=True)
class ArmModel:
    """A model that can be prompted: `suffix` tells its arms from those of the base that is tuned.

    `scorer` is None for a model that gives no likelihoods, which is every remote one.
    """

    suffix: str
    label: str
    identity: str
    predictor: Callable[[], Predictor]
    scorer: Callable[[], Scorer] | None
    count_tokens: Callable[[Sequence[Message]], int] | None
    max_prompt_tokens: int | None


MAX_LENGTH_RATIO = 1.5
"""How long an answer may become, in long answers of the author's: whoever passes that is not about to end."""


def long_answer_tokens(story: Story) -> int:
    """The 99th percentile of the author's training answers."""
    chat = story.local.loaded.chat
    lengths = sorted(chat.encode(example.messages, example.answer).num_answer_tokens for example in story.examples_of("train"))
    return lengths[min(len(lengths) - 1, int(0.99 * len(lengths)))]


def answer_tokens(story: Story) -> int:
    """How long an answer may become."""
    return round(MAX_LENGTH_RATIO * long_answer_tokens(story))


def base_sampling(story: Story) -> Sampling:
    """Greedy, for every prompted arm alike."""
    return Sampling(max_new_tokens=answer_tokens(story))


def arm_models(story: Story) -> Iterator[ArmModel]:
    """The base that is tuned, then the further models."""
    loaded = story.local.loaded
    sampling = base_sampling(story)
    room = loaded.max_seq_length - long_answer_tokens(story)
    yield ArmModel(
        "", loaded.name_or_path, story.model_identity, lambda: story.local.predictor("base", None, sampling),
        lambda: LocalScorer(loaded), loaded.chat.count_tokens, room,
    )  # fmt: skip
    for model in story.config.baselines.models:
        yield _further_model(story, model, sampling)


def _further_model(story: Story, model: ArmModelConfig, sampling: Sampling) -> ArmModel:
    if (model.name_or_path is None) == (model.remote is None):
        raise ConfigError(
            f"Arm model {model.name!r} needs either name_or_path or remote", place="baselines.models", remedy="Give exactly one."
        )
    if model.remote is not None:
        remote = model.remote
        identity = content_hash(remote.base_url, remote.model)
        journal = story.project.arm_path(f"journal@{model.name}")
        return ArmModel(
            f"@{model.name}", model.name, identity,
            lambda: RemoteModel(remote, story.ledger, name=model.name, journal=ReplyJournal(journal, remote)), None, None, None,
        )  # fmt: skip
    from giong.generation.local import LocalModel
    from giong.models.load import load_model, model_identity
    from giong.workflow.probing import DTYPES, probe

    config = ModelConfig(name_or_path=model.name_or_path)
    loaded = load_model(config, dtype=DTYPES[probe(story)["dtype"]])
    local = LocalModel(loaded)
    room = loaded.max_seq_length - long_answer_tokens(story)
    return ArmModel(
        f"@{model.name}",
        model.name,
        model_identity(config),
        lambda: local.predictor(model.name, None, sampling),
        lambda: LocalScorer(loaded),
        loaded.chat.count_tokens,
        room,
    )


def answer_baselines(story: Story) -> None:
    """Let every arm answer the test requests; an arm whose inputs did not change keeps its replies."""
    config = story.config.baselines
    test, train = story.test_examples, story.examples_of("train")
    if not train or not test:
        raise StoryError(
            "There are no training or no test requests",
            place=str(story.project.examples_path),
            remedy="Run `giong synth`, or add documents.",
        )
    # Once: it looks at every training answer.
    sampling = base_sampling(story)
    requests = [Request(example.id, example.messages, sampling) for example in test]
    names = config.arms if "base" in config.arms else ["base", *config.arms]
    for model in arm_models(story):
        pending = []
        for name in names:
            key = content_hash(name, model.identity, config.num_shots, config.likelihood, examples_hash(test), examples_hash(train))
            if not story.is_current(f"baseline-{name}{model.suffix}", key):
                pending.append((name, key))
        if not pending:
            continue
        _announce(story, model, len(pending) * len(requests))
        predictor = model.predictor()
        for name, key in pending:
            step = f"baseline-{name}{model.suffix}"
            arm = BASELINES[name](predictor, train, config, count_tokens=model.count_tokens, max_prompt_tokens=model.max_prompt_tokens)
            with Stage(story, step, f"{ARM_LABELS[name]}, {model.label}, {len(requests)} requests") as stage:
                replies = arm.predict(requests, story.progress(step, "answers"))
                write_replies(story.project, f"{name}{model.suffix}", replies)
                made = [story.project.arm_path(f"{name}{model.suffix}")]
                # What an earlier run measured may belong to other texts.
                scores_path(story, f"{name}{model.suffix}").unlink(missing_ok=True)
                if model.scorer and (name == "base" or config.likelihood):
                    made.append(_score_answers(story, f"{name}{model.suffix}", arm, model.scorer(), test))
            result = {"seconds": stage.seconds, "label": arm_label(name, model.label if model.suffix else ""), **arm_details(arm)}
            result["usd"] = sum(reply.cost_usd for reply in replies)
            result["examples_hash"] = examples_hash(test)
            story.project.finish_step(step, key, made, result)
            if detail := result.get("style_name"):
                story.notice(
                    step, f"the model names this style: {detail}" + (" (fallback)" if result.get("style_name_is_fallback") else "")
                )


def arm_label(name: str, model: str = "") -> str:
    return f"{ARM_LABELS[name]} ({model})" if model else ARM_LABELS[name]


def arm_details(arm: Predictor) -> dict[str, object]:
    """What an arm recorded about itself: shots that fitted, the style that was named."""
    return {name: getattr(arm, name) for name in ("num_shots_used", "style_name", "style_name_is_fallback") if hasattr(arm, name)}


def _announce(story: Story, model: ArmModel, num_requests: int) -> None:
    if model.suffix:
        story.notice(
            "baseline",
            f"{num_requests} requests to {model.label}; spent so far ${story.ledger.spent_usd:.2f} of ${story.ledger.max_usd:.2f}",
        )
        return
    announce_answers(story, "baseline", num_requests)


def announce_answers(story: Story, stage: str, num_requests: int) -> None:
    """Say beforehand what writing so many answers here takes, from the probe's measurement."""
    from giong.workflow.probing import probe

    measured = probe(story)
    tokens = long_answer_tokens(story)
    estimate = estimate_generation(
        story.local.loaded.shape, num_requests, 3 * tokens, tokens, measured["dtype"], story.local.room.max_rows,
        measured["write_tokens_per_second"], usd_per_hour=story.config.budget.usd_per_hour,
    )  # fmt: skip
    story.notice(
        stage,
        f"{num_requests} answers, about {format_seconds(estimate.seconds)}, {format_bytes(estimate.peak_memory_bytes)}, {format_cost(estimate.usd)}",
    )


def _score_answers(story: Story, arm_name: str, arm: Prompted, scorer: Scorer, test: Sequence[Example]) -> Path:
    """Write down how likely the author's own answers are under the prompts of an arm; returns the file."""
    asked = [ScoreRequest(example.answer, arm.prompt(Request(example.id, example.messages)).messages) for example in test]
    with story.local.using(None):
        scores = scorer.score(asked, story.progress(f"baseline-{arm_name}", "likelihoods"))
    path = scores_path(story, arm_name)
    write_jsonl(path, scores)
    return path


def scores_path(story: Story, arm: str) -> Path:
    return story.project.arm_path(f"likelihood-{arm}")


def read_scores(story: Story, arm: str) -> list[TokenScores] | None:
    """The likelihoods of the author's answers under an arm's prompts; None for an arm whose model gives none."""
    path = scores_path(story, arm)
    return read_token_scores(path) if path.is_file() else None


def read_token_scores(path: Path) -> list[TokenScores]:
    return [TokenScores(tuple(row["logprobs"]), row["num_bytes"]) for row in read_jsonl(path)]
