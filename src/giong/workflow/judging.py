"""The judge of `evaluation.judge` within a story: which arms it compares, what it is shown, and where its answers are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from giong.clients.openai_compatible import RemoteModel
from giong.clients.reply_journal import ReplyJournal
from giong.config import JudgeConfig
from giong.data.examples import spread
from giong.errors import ConfigError
from giong.evaluation.compare.votes import Vote, read_votes, votes_path
from giong.evaluation.judge import agreement_with_people, judge_arms
from giong.evaluation.results import AUTHOR, TUNED, ArmOutput, Evaluation, finite
from giong.workflow.story import Story
from giong.workspace import Project


def make_judge(story: Story, known_arms: Sequence[str]) -> RemoteModel | None:
    """The judge's client, None where none is configured. Raises ConfigError for a missing key or an unknown arm, before anything runs."""
    config = story.config.evaluation.judge
    if config is None:
        return None
    if unknown := sorted(set(config.arms or ()) - {*known_arms, AUTHOR}):
        remedy = f"The arms are: {', '.join([*known_arms, AUTHOR])}."
        raise ConfigError(f"There is no arm {unknown[0]!r}", place="evaluation.judge.arms", remedy=remedy)
    journal = ReplyJournal(story.project.arm_path("journal-judge"), config.model)
    return RemoteModel(config.model, story.ledger, purpose="judge", journal=journal)


def judge_outputs(
    story: Story, judge: RemoteModel, config: JudgeConfig, outputs: Sequence[ArmOutput], evaluation: Evaluation
) -> dict[str, Any]:
    """The judgement as plain values."""
    test = story.test_examples
    chosen = config.arms or dict.fromkeys([evaluation.base_arm, evaluation.best_prompt_arm, TUNED, AUTHOR])
    texts = {output.name: [reply.text for reply in output.replies] for output in outputs}
    texts[AUTHOR] = [example.answer for example in test]
    asked = spread(test, config.max_requests)
    places = [place for place, example in enumerate(test) if example in asked]
    answers = {name: [texts[name][place] for place in places] for name in chosen if name in texts}
    written = story.passage_texts("train")
    samples = written[:: max(1, len(written) // config.num_samples)][: config.num_samples]
    settings = {"num_bootstrap": story.config.evaluation.num_bootstrap, "seed": story.config.evaluation.seed}
    story.notice("eval", f"{config.model.model} judges {len(asked)} requests; spent so far ${story.ledger.spent_usd:.2f}")
    found = judge_arms(judge, samples, asked, answers, **settings)
    for sentence in found.sentences:
        story.notice("eval", sentence)
    labels = {output.name: output.label for output in outputs}
    return finite({**found.to_dict(), "labels": labels})


def with_agreement(project: Project, judged: dict[str, Any]) -> dict[str, Any]:
    """The judgement beside the votes that people have cast until now."""
    if not judged.get("votes") or not votes_path(project).is_file():
        return judged
    pair = agreement_with_people([Vote(**vote) for vote in judged["votes"]], read_votes(votes_path(project)))
    return {**judged, "agreement": finite(pair)} if pair else judged
