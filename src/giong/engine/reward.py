"""A trained reward model at work: requests and answers in, scores out.

One decision a reader may question: it is a plain classifier of transformers with one output (`AutoModelForSequenceClassification`), read
on the state of the answer's end-of-turn token; so other tools can use what is trained here, and the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from giong.contracts import ScoreRequest
from giong.engine.step import evaluate_rows
from giong.models.chat_template import ChatFormat
from giong.models.row_model import RowModel
from giong.models.rows import Row


class RewardModel:
    """Scores answers to requests; higher is better, and only differences on one request mean something."""

    def __init__(self, loaded: RowModel, chat: ChatFormat, *, max_tokens_per_pack: int = 2048) -> None:
        self.loaded, self.chat, self.max_tokens_per_pack = loaded, chat, max_tokens_per_pack

    def rewards(self, requests: Sequence[ScoreRequest]) -> list[float]:
        """One score per answer (`text`) to its request (`messages`), in their order; a request too long loses its beginning."""
        rows = []
        for request in requests:
            ids = self.chat.encode(request.messages, request.text).input_ids[-self.loaded.max_seq_length :]
            rows.append(Row(ids, np.zeros(len(ids), dtype=np.float32), target=np.zeros(1, dtype=np.float32)))
        return [float(output[0]) for output in evaluate_rows(self.loaded.model, rows, self.max_tokens_per_pack)]
