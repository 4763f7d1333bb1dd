"""The training examples whose requests are most like the new one, shown before it, the most similar last.

Similarity is the TF-IDF cosine of the requests: it needs no weights, works in every language (character n-grams where
there are no spaces), and is the same for local and remote models.
"""

from __future__ import annotations

from collections.abc import Sequence

from giong.baselines.prompted import Prompted
from giong.baselines.turns import CountTokens, different_answers, fits, shown, with_turns
from giong.contracts import Example, Predictor, Request, request_text
from giong.data.words import is_unspaced


class Retrieval(Prompted):
    """The model with the nearest examples; where they do not all fit, the least similar are left out."""

    def __init__(
        self, predictor: Predictor, train_examples: Sequence[Example], num_shots: int, name: str = "retrieval", *,
        count_tokens: CountTokens | None = None, max_prompt_tokens: int | None = None,
    ) -> None:  # fmt: skip
        from sklearn.feature_extraction.text import TfidfVectorizer

        super().__init__(predictor, name)
        self.num_shots = num_shots
        self._count_tokens, self._max_prompt_tokens = count_tokens, max_prompt_tokens
        self._examples = list(train_examples)
        texts = [request_text(example.messages) for example in self._examples]
        # One-letter words are words too (Vietnamese "ở", English "I"), which sklearn's own pattern leaves out.
        settings = {"analyzer": "char", "ngram_range": (1, 3)} if _mostly_unspaced("".join(texts)) else {"token_pattern": r"(?u)\b\w+\b"}
        self._vectorizer = TfidfVectorizer(sublinear_tf=True, **settings)
        self._vectors = self._vectorizer.fit_transform(texts) if any(text.strip() for text in texts) else None
        self.shots_by_request: dict[str, int] = {}

    @property
    def num_shots_used(self) -> int:
        """Examples shown: the fewest that any request got so far."""
        return min([self.num_shots, len(different_answers(self._examples)), *self.shots_by_request.values()])

    def nearest(self, request: Request) -> list[Example]:
        """The nearest examples with different answers, most similar last."""
        if self._vectors is None:
            return []
        similarities = (self._vectors @ self._vectorizer.transform([request_text(request.messages)]).T).toarray()[:, 0]
        order = sorted(range(len(self._examples)), key=lambda index: (-similarities[index], index))
        return different_answers([self._examples[index] for index in order])[: self.num_shots][::-1]

    def prompt(self, request: Request) -> Request:
        shots = self.nearest(request)
        while shots and not fits(with_turns(request, shown(shots)).messages, self._count_tokens, self._max_prompt_tokens):
            shots.pop(0)
        self.shots_by_request[request.id] = len(shots)
        return with_turns(request, shown(shots))


def _mostly_unspaced(text: str) -> bool:
    letters = [character for character in text if character.isalpha()]
    return 2 * sum(map(is_unspaced, letters)) > len(letters)
