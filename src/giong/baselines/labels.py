"""What a classifier has to beat without any language model: the most common label, and a bag of words.

The bag of words is tf-idf over words and pairs of words under a logistic regression (ridge for values), scikit-learn's: on many a data
set of whole texts it is hard to beat (Wang and Manning 2012, ACL, "Baselines and bigrams"). And what a prompted generator answers.

Axis letters: N texts, C labels (1 for a regression).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from giong.contracts import Example, Message, Predictor, Request

INSTRUCTION = "Label the text of each message. Answer with exactly one of these labels and nothing else: {labels}."


def majority(train_NC: np.ndarray, num_texts: int, problem: str) -> np.ndarray:
    """The same for every text: how common each label is in training, or the mean value."""
    return np.tile(train_NC.mean(0), (num_texts, 1))


def bag_of_words(train_texts: Sequence[str], train_NC: np.ndarray, texts: Sequence[str], problem: str) -> np.ndarray:
    """(N, C): probabilities, or values. A label that every training text or none has keeps that share."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge

    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b")
    try:
        train, test = words.fit_transform(train_texts), words.transform(texts)
    except ValueError:
        # Texts without a word.
        return majority(train_NC, len(texts), problem)
    if problem == "regression":
        return Ridge(alpha=1.0).fit(train, train_NC[:, 0]).predict(test)[:, None]
    scores_NC = majority(train_NC, len(texts), problem)

    def fitted(classes: np.ndarray) -> LogisticRegression:
        return LogisticRegression(C=10.0, max_iter=1000).fit(train, classes)

    if problem == "single_label":
        model = fitted(train_NC.argmax(1)) if (train_NC.sum(0) > 0).sum() > 1 else None
        if model is not None:
            scores_NC[:] = 0.0
            scores_NC[:, model.classes_] = model.predict_proba(test)
        return scores_NC
    for label in range(train_NC.shape[1]):
        if 0 < train_NC[:, label].sum() < len(train_NC):
            scores_NC[:, label] = fitted(train_NC[:, label].astype(int)).predict_proba(test)[:, 1]
    return scores_NC


def shots_of(texts: Sequence[str], train_NC: np.ndarray, names: Sequence[str], num_shots: int) -> list[Example]:
    """As examples to show: of each label the first `num_shots` texts of medium length, in turns."""
    by_label = []
    for label, name in enumerate(names):
        members = [text for text, row in zip(texts, train_NC) if row.argmax() == label]
        middle = sorted(map(len, members))[len(members) // 2] if members else 0
        members.sort(key=lambda text: (abs(len(text) - middle), text))
        by_label.append([Example(name, name, "label", (Message("user", text),), name) for text in members[:num_shots]])
    return [shot for turn in range(num_shots) for shots in by_label for shot in shots[turn : turn + 1]]


def prompted(predictor: Predictor, texts: Sequence[str], names: Sequence[str], shots: Sequence[Example]) -> tuple[np.ndarray, int]:
    """(N, C) with 1 at the label that the generator names, and how many of its answers name none: these get equal shares."""
    turns = [turn for shot in shots for turn in shot.conversation]
    system = Message("system", INSTRUCTION.format(labels=", ".join(names)))
    replies = predictor.predict([Request(f"text {number}", (system, *turns, Message("user", text))) for number, text in enumerate(texts)])
    scores_NC, num_unknown = np.full((len(texts), len(names)), 1 / len(names)), 0
    for row, reply in zip(scores_NC, replies):
        label = named_label(reply.text, names)
        if label is None:
            num_unknown += 1
        else:
            row[:] = np.eye(len(names))[label]
    return scores_NC, num_unknown


def named_label(answer: str, names: Sequence[str]) -> int | None:
    """The label that an answer names: alone on its first line, or the only one in the whole answer. None where that is not clear."""
    first = answer.strip().split("\n", 1)[0].strip(" .\"'`*").casefold()
    folded = [name.casefold() for name in names]
    if first in folded:
        return folded.index(first)
    held = [index for index, name in enumerate(folded) if name in answer.casefold()]
    return held[0] if len(held) == 1 else None
