"""The same request in five wordings: does the answer depend on how one asks?

The content stays, the instruction around it changes, so only requests with a content of their own (neutral rewrites) can be asked
again. Wordings are fixed, in English and Vietnamese: a model that writes them would be one more thing that varies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from giong.data.synthesis.stand_in import is_english
from giong.evaluation.metrics.meaning import chrf_scores

WORDINGS = {
    "en": (
        "{content}", "Please put this in your own words:\n\n{content}", "How would you write the following?\n\n{content}",
        "{content}\n\nSay this the way you would say it.", "Here is a draft. Write it as you would:\n\n{content}",
    ),
    "vi": (
        "{content}", "Hãy viết lại theo lời của bạn:\n\n{content}", "Bạn sẽ viết đoạn sau như thế nào?\n\n{content}",
        "{content}\n\nHãy nói điều này theo cách của bạn.", "Đây là bản nháp. Hãy viết lại theo ý bạn:\n\n{content}",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Consistency:
    """`style_spread`: standard deviation of the style score over the wordings of one request, mean over requests, in spreads of the
    witnesses; `agreement`: chrF++ (0 to 100) between the replies to two wordings, mean over all pairs.
    """

    style_spread: float | None
    agreement: float
    num_requests: int
    num_wordings: int


def reworded(content: str) -> list[str]:
    """The request in five wordings, in its own language where that is English or Vietnamese (English around any other)."""
    language = "vi" if not is_english(content) and any(sign in content.lower() for sign in "ăđơư") else "en"
    return [wording.replace("{content}", content) for wording in WORDINGS[language]]


def consistency(replies_WN: Sequence[Sequence[str]], style_WN: np.ndarray | None) -> Consistency:
    """From W wordings of N requests; `style_WN` are the replies' style scores, None where style is not measurable."""
    pairs = [
        (one, other)
        for first in range(len(replies_WN))
        for second in range(first)
        for one, other in zip(replies_WN[first], replies_WN[second])
    ]
    agreement = float(np.mean(chrf_scores(*map(list, zip(*pairs)))))
    spread = None if style_WN is None else float(np.std(style_WN, axis=0).mean())
    return Consistency(spread, agreement, len(replies_WN[0]), len(replies_WN))
