"""Semi-supervised training: the tuned model answers requests that have no answer, and what it is sure of becomes rows.

Pseudo-labels (Lee 2013) in rounds of self-training (Xie et al. 2020, 1911.04252, algorithm 1): each round trains anew from the base, on
the author's rows and on the answers kept last. The author's text is never touched; a row that a model wrote is of kind `pseudo`, in the
run's record and in pseudo.jsonl beside it.

One decision a reader may question: besides the confidence the gates' own limits apply to every single answer. A model is surest of
loops and of what it knows by heart, so confidence alone would keep exactly these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from giong.config import PseudoConfig
from giong.contracts import Example, Message, Reply, Request, request_text
from giong.data.synthesis.kinds import KINDS
from giong.errors import DataError
from giong.evaluation.gates import CollapseBand, overlap_limit
from giong.evaluation.metrics.meaning import closed_words, key_recall
from giong.evaluation.metrics.text import CorpusIndex
from giong.workflow.sampling import choose_sampling
from giong.workflow.story import Stage, Story
from giong.workflow.training import Run, perform_run, plan_run, score_answers, tuned
from giong.workspace import content_hash, read_jsonl, write_jsonl

RECALL_PERCENTILE = 10.0
"""An answer has to keep as many key items of its request as the author's own answers do, but for their lowest tenth."""


def train_rounds(story: Story, config: PseudoConfig, requests: Sequence[Request], run: Run) -> Run:
    """The last of the rounds, each trained to the end; `run` itself where no answer was ever kept."""
    for number in range(1, config.rounds + 1):
        kept = answers_of(story, config, run, requests, number)
        if not kept:
            story.notice("train", f"pseudo round {number}: none of {len(requests)} answers was kept, so nothing is trained on them")
            return run
        run = plan_run(story, 1.0, pseudo=kept)
        perform_run(story, run, f"train-pseudo-{number}")
    return run


def read_requests(story: Story, config: PseudoConfig) -> list[Request]:
    """The requests of the file. Raises DataError with the line for a row that is none, and for one that the test or validation asks."""
    path = (story.project.root / Path(config.requests).expanduser()).resolve()
    if not path.is_file():
        raise DataError("There is no file of requests", place=str(path), remedy="Correct train.pseudo.requests.")
    frozen = {request_text(example.messages) for side in ("calibration", "test") for example in story.examples_of(side)}
    requests = []
    for number, row in enumerate(read_jsonl(path), start=1):
        place = f"{path}:{number}"
        messages = _messages(story, row, place)
        if request_text(messages) in frozen:
            raise DataError(
                "This request is one of the frozen test or validation side", place=place,
                remedy="Take it out: what is measured must not be trained on.",
            )  # fmt: skip
        requests.append(Request(f"pseudo:{number}", messages))
    if not requests:
        raise DataError("The file of requests is empty", place=str(path), remedy="Correct train.pseudo.requests.")
    return requests


def _messages(story: Story, row: Any, place: str) -> tuple[Message, ...]:
    if isinstance(row, Mapping) and isinstance(text := row.get("request"), str) and text.strip():
        synthesis = story.config.synthesis
        return KINDS[synthesis.kinds[0]].training_messages(text, drop_instruction=synthesis.drop_instruction)
    turns = row.get("messages") if isinstance(row, Mapping) else None
    if isinstance(turns, list) and turns and all(isinstance(turn, Mapping) and {"role", "content"} <= set(turn) for turn in turns):
        messages = tuple(Message(turn["role"], turn["content"]) for turn in turns)
        if messages[-1].role == "user" and all(isinstance(message.content, str) for message in messages):
            return messages
    raise DataError(
        "A request needs a text `request`, or `messages` that end with the user's", place=place, remedy="Mend or delete that line."
    )


def answers_of(story: Story, config: PseudoConfig, run: Run, requests: Sequence[Request], number: int) -> list[Example]:
    """What the run's model answers, as far as it is kept. All answers are written to pseudo.jsonl in the run's folder, with the reason."""
    path = run.folder / f"pseudo-{content_hash(requests, config.min_confidence, story.config.sampling)}.jsonl"
    if not path.is_file():
        with Stage(story, f"pseudo-{number}", f"{len(requests)} requests without an answer"), tuned(story, run.artifact, run.name) as model:
            local, adapter = model
            sampling, _ = choose_sampling(story, local, adapter)
            replies = local.predictor("pseudo", adapter, sampling).predict(requests, story.progress(f"pseudo-{number}", "answers"))
            asked = [Example(each.id, each.id, "pseudo", each.messages, reply.text) for each, reply in zip(requests, replies)]
            scores = score_answers(local, adapter, asked)
            limits = limits_of(story)
            rows = []
            for example, reply, score in zip(asked, replies, scores):
                confidence = float(np.mean(score.logprobs))
                reason = limits.why_rejected(reply, confidence, request_text(example.messages), config.min_confidence)
                rows.append({"messages": example.messages, "answer": reply.text, "confidence": confidence, "rejected": reason})
        write_jsonl(path, rows)
    stored = read_jsonl(path)
    kept = [
        Example(f"{run.name}:{request.id}", request.id, "pseudo", request.messages, row["answer"], source=run.name)
        for request, row in zip(requests, stored, strict=True)
        if not row["rejected"]
    ]
    story.notice(
        "train", f"pseudo round {number}: {len(kept)} of {len(requests)} answers are kept; the reasons for the others are in {path.name}"
    )
    return kept


@dataclass(frozen=True)
class AnswerLimits:
    """What a single answer has to pass, from the author's own unseen answers."""

    band: CollapseBand
    corpus: CorpusIndex
    max_overlap: float
    min_recall: float
    closed: frozenset[str]

    def why_rejected(self, reply: Reply, confidence: float, request: str, min_confidence: float) -> str:
        """Why an answer is not kept; empty where it is."""
        if reply.finish_reason != "stop" or not reply.text.strip():
            return "it is empty" if not reply.text.strip() else "it did not end by itself"
        if confidence < min_confidence:
            return f"confidence {confidence:.2f} is below {min_confidence:g}"
        if faults := self.band.faults(reply.text):
            return f"it repeats itself as the author never does ({', '.join(faults)})"
        if (share := self.corpus.share_copied(reply.text, request)) > self.max_overlap:
            return f"{share:.0%} of its 8-word runs stand in the training text"
        if (recall := key_recall(request, reply.text, self.closed)) < self.min_recall:
            return f"it keeps {recall:.0%} of the request's key items, the author at least {self.min_recall:.0%}"
        return ""


def limits_of(story: Story) -> AnswerLimits:
    """Limits from the validation side: the test side stays unseen."""
    own, corpus = story.examples_of("calibration"), CorpusIndex(story.passage_texts("train"))
    pairs = [(request_text(example.messages), example.answer) for example in own]
    closed = closed_words([request for request, _ in pairs])
    overlaps = [corpus.share_copied(answer, request) for request, answer in pairs]
    recalls = [recall for request, answer in pairs if not np.isnan(recall := key_recall(request, answer, closed))]
    least = float(np.percentile(recalls, RECALL_PERCENTILE)) if recalls else 0.0
    return AnswerLimits(CollapseBand([example.answer for example in own]), corpus, overlap_limit(overlaps), least, closed)
