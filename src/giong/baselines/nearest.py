"""Which texts are most like another: TF-IDF cosine.

It needs no weights, works in every language (character n-grams where there are no spaces), and is the same for local and remote
models.
"""

from __future__ import annotations

from collections.abc import Sequence

from giong.data.words import is_unspaced


class TextIndex:
    """Texts in the order of their similarity to a query."""

    def __init__(self, texts: Sequence[str]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._num_texts = len(texts)
        # One-letter words are words too (Vietnamese "ở", English "I"), which sklearn's own pattern leaves out.
        settings = {"analyzer": "char", "ngram_range": (1, 3)} if _mostly_unspaced("".join(texts)) else {"token_pattern": r"(?u)\b\w+\b"}
        self._vectorizer = TfidfVectorizer(sublinear_tf=True, **settings)
        self._vectors = self._vectorizer.fit_transform(texts) if any(text.strip() for text in texts) else None

    def order(self, query: str) -> list[int]:
        """Places of all texts, the most similar first; none where no text has a word."""
        if self._vectors is None:
            return []
        similarities = (self._vectors @ self._vectorizer.transform([query]).T).toarray()[:, 0]
        return sorted(range(self._num_texts), key=lambda index: (-similarities[index], index))


def _mostly_unspaced(text: str) -> bool:
    letters = [character for character in text if character.isalpha()]
    return 2 * sum(map(is_unspaced, letters)) > len(letters)
