"""Rewards of drawn answers: giong's own measurements and a trained reward model's score by name, weighted and summed.

One decision a reader may question: the reward for style ends at the author's own level. A verifier is a target that can be
overshot, and what lies beyond the author is caricature.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from giong.contracts import Example, Reply, ScoreRequest, request_text
from giong.engine.reward import RewardModel
from giong.errors import DataError
from giong.evaluation.metrics.meaning import chrf_scores, closed_words, key_recall
from giong.evaluation.metrics.style import StyleVerifier, split_background, window_length
from giong.evaluation.metrics.text import CorpusIndex, length_ratio, rep_n, words
from giong.workflow.other_models import named_reward_model
from giong.workflow.story import Story

LOWEST_STYLE = -2.0


class Rewards:
    """The weighted sum of the named rewards, each about 1 at its best and lower, or below 0, otherwise.

    `style`: the verifier's score over the author's own, at most 1. `key_recall`: key items of the request kept, over what the author
    keeps. `chrf`: likeness to the author's own answer. `ends`: whether the answer ended by itself. `repetition`, `length` and `copying`
    are penalties: share of repeated 4-grams, distance from the author's length (natural logarithm, at most 1), share of words copied
    from the training text. `reward_model`: the score of `objective.reward_model`, on a scale of its own. Raises DataError where style is asked for and cannot be measured.
    """

    def __init__(self, story: Story, weights: Mapping[str, float]) -> None:
        self.weights = dict(weights)
        train = story.passage_texts("train")
        self._closed = closed_words([request_text(example.messages) for example in story.examples_of("train")])
        self._corpus = CorpusIndex(train)
        self._verifier, self._author_level = self._style(story, train) if "style" in self.weights else (None, 1.0)
        self._reward_model = self._named_model(story) if "reward_model" in self.weights else None

    @staticmethod
    def _named_model(story: Story) -> RewardModel:
        from giong.workflow.rewarding import load_reward_model

        return load_reward_model(story, named_reward_model(story.project, story.config.objective))

    def _style(self, story: Story, train: Sequence[str]) -> tuple[StyleVerifier, float]:
        from giong.workflow.measuring import background_voices

        calibration = story.passage_texts("calibration")
        fit, calibrate, _ = split_background(background_voices(story)[0], window_length(train))
        verifier = StyleVerifier().fit(train, fit, story.config.evaluation.seed).calibrate(calibration, calibrate)
        level = float(verifier.combined(calibration).mean())
        if not level > 0:
            raise DataError(
                "The style verifier cannot tell this author from others, so there is no reward for style", place="objective.rewards",
                remedy="Add writing, or leave `style` out.",
            )  # fmt: skip
        return verifier, level

    def __call__(self, examples: Sequence[Example], replies: Sequence[Reply]) -> dict[str, np.ndarray]:
        """Every reward by name, shape (len(replies),), `style` and `reward_model` only where they count, and the weighted sum under `total`."""
        pairs = [(example, reply.text) for example, reply in zip(examples, replies)]
        texts = [text for _, text in pairs]
        found = {
            "key_recall": [self._kept(*pair) for pair in pairs],
            "chrf": np.array(chrf_scores(texts, [example.answer for example in examples])) / 100,
            "ends": [reply.finish_reason == "stop" and bool(reply.text.strip()) for reply in replies],
            "repetition": [-rep_n(words(text), 4) for text in texts],
            "length": [-min(1.0, abs(math.log(length_ratio(text, example.answer)))) for example, text in pairs],
            "copying": [-self._corpus.share_copied(text, request_text(example.messages)) for example, text in pairs],
        }
        if self._verifier:
            found["style"] = np.clip(self._verifier.combined(texts) / self._author_level, LOWEST_STYLE, 1.0)
        if self._reward_model:
            found["reward_model"] = self._reward_model.rewards([ScoreRequest(text, example.messages) for example, text in pairs])
        rewards = {name: np.asarray(values, dtype=float) for name, values in found.items()}
        rewards["total"] = sum((weight * rewards[name] for name, weight in self.weights.items()), np.zeros(len(texts)))
        return rewards

    def _kept(self, example: Example, text: str) -> float:
        request = request_text(example.messages)
        own = key_recall(request, example.answer, self._closed)
        # Where the author keeps nothing, or there is nothing to keep, nobody has to.
        return min(1.0, key_recall(request, text, self._closed) / own) if own > 0 else 1.0
