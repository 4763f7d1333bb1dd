"""Can a classifier tell an arm's replies from the author's own answers to the same requests? (Lopez-Paz and Oquab 2017, 1610.06545)

The classifier is the nearest mean over content-masked character n-grams, each text judged by other documents alone: it needs no
fitting, so that the permutation test is exact and takes milliseconds. Labels are swapped within pairs, because both texts of a pair
answer one request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_PERMUTATIONS = 500
MAX_FEATURES = 20_000


@dataclass(frozen=True, slots=True)
class TwoSample:
    """`auc` is 0.5 where the two cannot be told apart and 1 where they always can; `p_value` that of "both are the same"."""

    auc: float
    p_value: float
    num_pairs: int


def two_sample_test(texts: Sequence[str], author_texts: Sequence[str], documents: Sequence[str], seed: int = 0) -> TwoSample | None:
    """Test N paired texts, already masked (`style.mask_content`); None where fewer than four pairs or documents to judge by are left."""
    from scipy.stats import rankdata
    from sklearn.feature_extraction.text import TfidfVectorizer

    num = len(texts)
    names = list(documents) if len(set(documents)) > 1 else [str(place) for place in range(num)]
    everything = [*author_texts, *texts]
    if num < 4 or not any(text.strip() for text in texts):
        return None
    vectorizer = TfidfVectorizer(
        analyzer="char", ngram_range=(1, 4), lowercase=False, sublinear_tf=True, min_df=2, max_features=MAX_FEATURES
    )
    vectors = vectorizer.fit_transform([" ".join(text.split()) for text in everything])
    owners = np.array([*names, *names], dtype=object)
    similar = (vectors @ vectors.T).toarray() * (owners[:, None] != owners[None, :])

    swaps = np.random.default_rng(seed).choice([-1.0, 1.0], size=(NUM_PERMUTATIONS, num))
    swaps = np.concatenate([np.ones((1, num)), swaps])
    is_author = np.concatenate([swaps, -swaps], axis=1)
    # Similarity to the author's texts less that to the arm's; either is judged by as many texts of as many other documents.
    scores = (is_author @ similar) / np.maximum((owners[:, None] != owners[None, :]).sum(axis=1), 1)
    ranks = rankdata(scores, axis=1)
    sums = np.where(is_author > 0, ranks, 0).sum(axis=1)
    aucs = (sums - num * (num + 1) / 2) / num**2
    return TwoSample(float(aucs[0]), float(np.mean(aucs >= aucs[0] - 1e-12)), num)
