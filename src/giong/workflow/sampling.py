"""Choose how the tuned model draws its tokens, on calibration requests: the test side stays unseen.

Few settings and one rule: the most key items kept among those that end by themselves and do not loop. The choice is saved
with the model and is what it is evaluated and served with.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from giong.contracts import Request, Sampling
from giong.data.examples import spread
from giong.evaluation.metrics.meaning import closed_words, key_recall
from giong.evaluation.metrics.text import rep_n, words
from giong.generation.local import LocalModel
from giong.workflow.arms import answer_tokens
from giong.workflow.story import Stage, Story

NUM_REQUESTS = 16
CANDIDATES = (
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.1},
    {"temperature": 0.0, "repetition_penalty": 1.2},
    {"temperature": 0.0, "repetition_penalty": 1.1, "no_repeat_ngram_size": 4},
    {"temperature": 0.0, "repetition_penalty": 1.2, "no_repeat_ngram_size": 4},
    {"temperature": 0.7, "top_p": 0.9},
)


def choose_sampling(story: Story, local: LocalModel, adapter: str | None) -> tuple[Sampling, list[dict[str, Any]]]:
    """The best candidate and what each reached: share of answers that end, that do not loop, and key recall."""
    examples = spread(story.examples_of("calibration"), NUM_REQUESTS)
    limit = answer_tokens(story)
    requests = [Request(example.id, example.messages) for example in examples]
    texts = ["\n".join(message.content for message in example.messages) for example in examples]
    closed = closed_words(texts)
    trials = []
    given = story.config.sampling.chosen()
    candidates = [given] if given else CANDIDATES
    with Stage(story, "sampling", f"{len(candidates)} settings on {len(requests)} calibration requests"):
        samplings = [Sampling(**candidate, max_new_tokens=limit) for candidate in candidates]
        # All at once: rows of a batch may draw their tokens each in its own way.
        asked = [replace(request, sampling=sampling) for sampling in samplings for request in requests]
        every = local.predictor("tuned", adapter).predict(asked, story.progress("sampling", "answers"))
        for number, sampling in enumerate(samplings):
            replies = every[number * len(requests) : (number + 1) * len(requests)]
            ended = sum(reply.finish_reason == "stop" for reply in replies) / len(replies)
            steady = sum(rep_n(words(reply.text), 4) <= 0.02 for reply in replies) / len(replies)
            recall = sum(key_recall(text, reply.text, closed) for text, reply in zip(texts, replies)) / len(replies)
            trials.append({"sampling": asdict(sampling), "ended": ended, "steady": steady, "key_recall": recall})
    best = max(trials, key=lambda trial: (trial["ended"] >= 0.9, round(trial["steady"], 1), trial["key_recall"]))
    return Sampling(**best["sampling"]), trials
