"""Whose voice a text has: four witnesses that compare the author with other writers.

The witnesses are relative, never one-class: distance to the author alone calls other writers closer than the author
himself. They are calibrated on held-out documents, since training passages score far above unseen ones. Word salad made
of the author's own words fools all of them, which is why a style score is only read behind the gates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from giong.errors import DataError
from giong.evaluation.metrics.compression import Ppm, compression_gain, num_characters
from giong.evaluation.metrics.text import cut_windows, mostly_unspaced, word_spans, words

WITNESSES = ("char", "mask", "delta", "ppm")
MAX_WINDOW_TOKENS = 100
NUM_KEPT_WORDS = 200
NUM_DELTA_WORDS = 150
MAX_FEATURES = 60_000
MIN_POOLED_AUC = 0.80
NUM_POOLS = 200
MIN_TRAIN_WORDS = 2500
MIN_TRAIN_PIECES = 50

Voices = Mapping[str, Sequence[str]]
Vectors = Callable[[Sequence[str]], np.ndarray]
"""Texts (N) to vectors (N, D)."""


@dataclass(frozen=True, slots=True)
class VerifierQuality:
    """How well the verifier tells the author's unseen texts from unseen texts of the other voices.

    `auc` is per piece, `auc_pooled` over pools of `pool_size` pieces; `c_at_1` and `brier` are per piece (PAN 2020: an
    answer between 0.45 and 0.55 counts as none given). `caution` is a sentence, or empty.
    """

    auc: float
    auc_pooled: float
    c_at_1: float
    brier: float
    pool_size: int
    num_author: int
    num_background: int
    measurable: bool
    caution: str = ""


def split_background(background: Voices, window_tokens: int) -> tuple[dict[str, list[str]], dict[str, list[str]], dict[str, list[str]]]:
    """Cut each voice into windows: its first half to fit on, the third quarter to calibrate, the last to test.

    Blocks and not every second window, so that one document hardly ever lies on two sides.
    """
    fit, calibration, test = {}, {}, {}
    for voice, texts in sorted(background.items()):
        pieces = [piece for text in texts for piece in cut_windows(text, window_tokens)]
        half, three_quarters = (len(pieces) + 1) // 2, len(pieces) - len(pieces) // 4
        fit[voice], calibration[voice], test[voice] = pieces[:half], pieces[half:three_quarters], pieces[three_quarters:]
    return fit, calibration, test


def window_length(author_texts: Sequence[str]) -> int:
    """Tokens per window: the author's median length, at most 100 (200 characters for unspaced scripts), at least 20."""
    limit = 2 * MAX_WINDOW_TOKENS if mostly_unspaced(author_texts) else MAX_WINDOW_TOKENS
    lengths = [len(word_spans(text)) for text in author_texts]
    return int(min(limit, max(20, np.median(lengths)))) if lengths else limit


class StyleVerifier:
    """Fit on the author and other voices, calibrate on held-out texts of both, then score any text.

    Deterministic for given texts and seed. Scores are higher the more author-like a text is; after calibration each
    witness has mean 0 midway between author and background and unit spread within them. With `vectors`, a learned model's, there is a
    fifth witness.
    """

    def __init__(self, vectors: Vectors | None = None) -> None:
        self.window_tokens = MAX_WINDOW_TOKENS
        self.witnesses = (*WITNESSES, *(["learned"] if vectors else []))
        self._vectors = vectors
        self._shift = dict.fromkeys(self.witnesses, 0.0)
        self._scale = dict.fromkeys(self.witnesses, 1.0)
        self._slope, self._intercept = 1.0, 0.0
        self._num_train_words, self._num_train_pieces = 0, 0

    def fit(self, author_train: Sequence[str], background: Voices, seed: int = 0) -> StyleVerifier:
        """Fit the witnesses. Raises DataError where there is no author text or no other voice."""
        voices = {voice: [text for text in texts if text.strip()] for voice, texts in sorted(background.items())}
        voices = {voice: texts for voice, texts in voices.items() if texts}
        if not any(text.strip() for text in author_train) or not voices:
            raise DataError(
                f"The style verifier needs the author's texts and other voices (author: {len(author_train)} texts, voices: {len(voices)})",
                place="evaluation.background", remedy="Name other writers' texts in evaluation.background.",
            )  # fmt: skip
        self._unspaced = mostly_unspaced(author_train)
        self.window_tokens = window_length(author_train)
        author = self._windows(author_train)
        others = {voice: self._windows(texts) for voice, texts in voices.items()}
        self._num_train_words, self._num_train_pieces = sum(len(words(piece)) for piece in author), len(author)
        texts = author + [piece for pieces in others.values() for piece in pieces]
        labels = np.array([1] * len(author) + [0] * (len(texts) - len(author)))
        self._kept = kept_words([author, *others.values()])
        self._char = _fit_ngrams(texts, labels, seed)
        self._mask = _fit_ngrams([mask_content(text, self._kept) for text in texts], labels, seed)
        self._delta = CosineDelta(author, others)
        if self._vectors:
            self._learned = _classifier(seed).fit(_unit(self._vectors(list(map(_plain_spaces, texts)))), labels)
        groups = [[_plain_spaces(text) for text in group] for group in (author, texts[len(author) :])]
        self._ppm_author, self._ppm_others = (Ppm(group, num_characters(*groups)) for group in groups)
        return self

    def calibrate(self, author_calibration: Sequence[str], background_calibration: Voices) -> StyleVerifier:
        """Put the witnesses on one scale and learn the probability "written by the author" from unseen texts of both."""
        author = self._windows(author_calibration)
        other = [piece for texts in background_calibration.values() for piece in self._windows(texts)]
        if len(author) < 2 or len(other) < 2:
            raise DataError(
                f"Too little unseen text to calibrate the style witnesses ({len(author)} pieces of the author, {len(other)} of others)",
                place="evaluation.background", remedy="Add documents, or raise data.calibration_share.",
            )  # fmt: skip
        raw_author, raw_other = self._raw(author), self._raw(other)
        for witness in self.witnesses:
            self._shift[witness] = float((raw_author[witness].mean() + raw_other[witness].mean()) / 2)
            spread = np.sqrt((raw_author[witness].var() + raw_other[witness].var()) / 2)
            self._scale[witness] = float(max(spread, 1e-6))
        combined = np.concatenate([self.combined(author), self.combined(other)])
        self._slope, self._intercept = _fit_probability(combined, np.array([1] * len(author) + [0] * len(other)))
        return self

    def score(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """The calibrated witnesses of each text and their mean under "combined"; each array has shape (len(texts),)."""
        raw = self._raw(texts)
        scores = {witness: (raw[witness] - self._shift[witness]) / self._scale[witness] for witness in self.witnesses}
        return {**scores, "combined": np.mean([scores[witness] for witness in self.witnesses], axis=0)}

    def combined(self, texts: Sequence[str]) -> np.ndarray:
        """Mean of the calibrated witnesses."""
        return self.score(texts)["combined"]

    def probability(self, texts: Sequence[str]) -> np.ndarray:
        """Calibrated probability that the author wrote each text (author and others equally likely beforehand)."""
        return 1 / (1 + np.exp(-(self._slope * self.combined(texts) + self._intercept)))

    def quality(self, author_test: Sequence[str], background_test: Voices, pool_size: int = 5, seed: int = 0) -> VerifierQuality:
        """AUC, pooled AUC, c@1 and Brier score on texts of author and others that nothing was fitted on."""
        author = self._windows(author_test)
        others = {voice: self._windows(texts) for voice, texts in background_test.items()}
        others = {voice: texts for voice, texts in others.items() if texts}
        other = [piece for pieces in others.values() for piece in pieces]
        if len(author) < 2 or len(other) < 2:
            caution = f"Too little unseen text to test the verifier ({len(author)} pieces of the author, {len(other)} of others)."
            return VerifierQuality(*[float("nan")] * 4, pool_size, len(author), len(other), False, caution)
        scores_author, scores_other = self.combined(author), {voice: self.combined(pieces) for voice, pieces in others.items()}
        auc = roc_auc(scores_author, np.concatenate(list(scores_other.values())))
        generator = np.random.default_rng(seed)
        pooled_other = np.concatenate([_pools(scores, pool_size, generator) for scores in scores_other.values()])
        auc_pooled = roc_auc(_pools(scores_author, pool_size, generator), pooled_other)
        probabilities = np.concatenate([self.probability(author), self.probability(other)])
        truth = np.array([1] * len(author) + [0] * len(other))
        caution = ""
        if self._num_train_words < MIN_TRAIN_WORDS * (2 if self._unspaced else 1) and self._num_train_pieces < MIN_TRAIN_PIECES:
            caution = (
                f"The verifier learnt from only {self._num_train_pieces} pieces ({self._num_train_words} words); "
                f"{MIN_TRAIN_PIECES} pieces or {MIN_TRAIN_WORDS} words make it dependable."
            )
        brier = float(np.mean((probabilities - truth) ** 2))
        measurable = auc_pooled >= MIN_POOLED_AUC
        return VerifierQuality(
            auc, auc_pooled, c_at_1(probabilities, truth), brier, pool_size, len(author), len(other), measurable, caution
        )  # fmt: skip

    def _windows(self, texts: Sequence[str]) -> list[str]:
        return [piece for text in texts for piece in cut_windows(text, self.window_tokens)]

    def _raw(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        masked, plain = [mask_content(text, self._kept) for text in texts], [_plain_spaces(text) for text in texts]
        raw = {
            "char": _decide(self._char, texts), "mask": _decide(self._mask, masked), "delta": self._delta.margins(texts),
            "ppm": compression_gain(plain, self._ppm_author, self._ppm_others),
        }  # fmt: skip
        if self._vectors:
            raw["learned"] = self._learned.decision_function(_unit(self._vectors(plain))) if plain else np.empty(0)
        return raw


class CosineDelta:
    """Cosine Delta margin: cos(z, author's centroid) - max over voices of cos(z, voice's centroid).

    z holds the standardised relative frequencies of the (at most 150) most frequent words (Evert et al. 2017, section 2).
    """

    def __init__(self, author: Sequence[str], others: Voices, num_words: int = NUM_DELTA_WORDS) -> None:
        counts = Counter(token for texts in (author, *others.values()) for text in texts for token in words(text))
        self.vocabulary = {word: index for index, (word, _) in enumerate(_most_frequent(counts)[:num_words])}
        groups = [self._frequencies(texts) for texts in (author, *others.values())]
        everything = np.concatenate(groups)
        self._mean = everything.mean(axis=0)
        spread = everything.std(axis=0)
        self._inverse_std = np.where(spread > 0, 1 / np.where(spread > 0, spread, 1), 0.0)
        self._centroids = np.stack([_unit(((group - self._mean) * self._inverse_std).mean(axis=0)) for group in groups])

    def margins(self, texts: Sequence[str]) -> np.ndarray:
        """The margin of each text, between -2 and 2."""
        z = _unit((self._frequencies(texts) - self._mean) * self._inverse_std)
        cosines = z @ self._centroids.T
        return cosines[:, 0] - cosines[:, 1:].max(axis=1)

    def _frequencies(self, texts: Sequence[str]) -> np.ndarray:
        frequencies = np.zeros((len(texts), len(self.vocabulary)))
        for row, text in enumerate(texts):
            tokens = words(text)
            for token in tokens:
                if token in self.vocabulary:
                    frequencies[row, self.vocabulary[token]] += 1 / len(tokens)
        return frequencies


def kept_words(groups: Sequence[Sequence[str]], num_kept: int = NUM_KEPT_WORDS) -> frozenset[str]:
    """The most frequent words among those that at least half of the writers use: near enough to function words."""
    counts: Counter[str] = Counter()
    writers: Counter[str] = Counter()
    for texts in groups:
        own = Counter(token for text in texts for token in words(text))
        counts.update(own)
        writers.update(own.keys())
    shared = [word for word, _ in _most_frequent(counts) if 2 * writers[word] >= len(groups)]
    return frozenset(shared[:num_kept])


def mask_content(text: str, kept: frozenset[str]) -> str:
    """Every other word as signs of the same length: `*` for small letters, `^` for capitals, `0` for digits.

    Text distortion, after Stamatatos 2017 (EACL, section 3): spaces, punctuation and the kept words stay as they are.
    """
    parts, end = [], 0
    for start, stop in word_spans(text):
        parts.append(text[end:start])
        word = text[start:stop]
        parts.append(word if word.casefold() in kept else "".join(map(_sign, word)))
        end = stop
    return "".join([*parts, text[end:]])


def roc_auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties counting half (Mann-Whitney)."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([positive, negative]))
    return float((ranks[: len(positive)].sum() - len(positive) * (len(positive) + 1) / 2) / (len(positive) * len(negative)))


def c_at_1(probabilities: np.ndarray, truth: np.ndarray, margin: float = 0.05) -> float:
    """c@1 = (n_correct + n_unanswered * n_correct / n) / n (Peñas & Rodrigo 2011); unanswered within `margin` of 0.5."""
    answered = np.abs(probabilities - 0.5) > margin
    num_correct = np.sum(answered & ((probabilities > 0.5) == (truth == 1)))
    num = len(probabilities)
    return float((num_correct + np.sum(~answered) * num_correct / num) / num)


def _fit_ngrams(texts: Sequence[str], labels: np.ndarray, seed: int) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline

    min_df = 3 if len(texts) >= 100 else 2 if len(texts) >= 30 else 1
    vectorizer = TfidfVectorizer(
        analyzer="char", ngram_range=(2, 5), lowercase=False, sublinear_tf=True, min_df=min_df, max_features=MAX_FEATURES, dtype=np.float32
    )  # fmt: skip
    return make_pipeline(vectorizer, _classifier(seed)).fit([_plain_spaces(text) for text in texts], labels)


def _classifier(seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=10, class_weight="balanced", solver="liblinear", max_iter=1000, random_state=seed)


def _decide(pipeline: Any, texts: Sequence[str]) -> np.ndarray:
    return np.asarray(pipeline.decision_function([_plain_spaces(text) for text in texts]), dtype=float) if len(texts) else np.empty(0)


def _plain_spaces(text: str) -> str:
    # Line breaks would tell who cut the text, not who wrote it.
    return " ".join(text.split())


def _fit_probability(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of Platt's logistic map, with both classes weighted alike."""
    from sklearn.linear_model import LogisticRegression

    platt = LogisticRegression(C=1.0, class_weight="balanced").fit(scores[:, None], labels)
    return float(platt.coef_[0, 0]), float(platt.intercept_[0])


def _pools(scores: np.ndarray, pool_size: int, generator: np.random.Generator) -> np.ndarray:
    """Means of random pools of different pieces, shape (NUM_POOLS,)."""
    size = min(pool_size, len(scores))
    order = generator.random((NUM_POOLS, len(scores))).argsort(axis=1)[:, :size]
    return scores[order].mean(axis=1)


def _most_frequent(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def _sign(character: str) -> str:
    return "^" if character.isupper() else "0" if character.isdigit() else "*" if character.isalnum() else character
