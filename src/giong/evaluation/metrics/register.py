"""How formal a text is, on the axis from the neutral requests to the author's answers: does a model stop short of him, or overshoot?

The axis is learnt from the project's own pairs and not from a word list: both sides of a pair say the same thing, so that what sets
them apart is register, in any language. It exists only where requests are neutral rewrites; a translation would give the language.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

MIN_PAIRS = 20


class RegisterAxis:
    """A linear scale of words and punctuation, fitted on training pairs; higher is further from the neutral requests."""

    def __init__(self, requests: Sequence[str], answers: Sequence[str], seed: int = 0) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        words_and_signs = TfidfVectorizer(token_pattern=r"(?u)\w+|[^\w\s]", ngram_range=(1, 2), sublinear_tf=True, min_df=2)
        classifier = LogisticRegression(C=10, solver="liblinear", random_state=seed)
        self._pipeline: Any = make_pipeline(words_and_signs, classifier)
        self._pipeline.fit([*requests, *answers], [0] * len(requests) + [1] * len(answers))

    def level(self, texts: Sequence[str]) -> np.ndarray:
        """Shape (len(texts),)."""
        return np.asarray(self._pipeline.decision_function(list(texts)), dtype=float)


def fit_register(pairs: Sequence[tuple[str, str]], seed: int = 0) -> RegisterAxis | None:
    """The axis of (neutral request, author's answer) pairs; None where fewer than twenty are there."""
    return RegisterAxis(*zip(*pairs), seed=seed) if len(pairs) >= MIN_PAIRS else None
