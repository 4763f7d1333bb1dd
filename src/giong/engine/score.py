"""A local model as a Scorer: the engine's own forward pass gives token log-probabilities.

It stands here and not in `generation` because scoring is the engine's packed forward pass without its backward half;
decoding shares nothing with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from giong.contracts import OnProgress, ScoreRequest, TokenScores
from giong.engine.kernel_choice import elementwise_of_run
from giong.engine.row_check import check_tokens
from giong.engine.step import evaluate_rows
from giong.models.load import LoadedModel
from giong.models.rows import Row, raw_text_rows
from giong.models.soft_prompt import room_for_text, soft_prompt_of

ROWS_PER_CALL = 32


class LocalScorer:
    """Scores texts with whatever adapter is active in the loaded model."""

    def __init__(self, loaded: LoadedModel, *, max_tokens_per_pack: int = 2048) -> None:
        self.loaded = loaded
        self.max_tokens_per_pack = max_tokens_per_pack

    def score(self, requests: Sequence[ScoreRequest], on_progress: OnProgress | None = None) -> list[TokenScores]:
        """Token log-probabilities in nats. Answers include their end-of-turn token; raw texts their end-of-text token.

        A text that is longer than the context by itself is scored in parts that overlap by one token; an answer that does
        not fit beside its request has the beginning of the request cut off. Raises ModelError for a model whose packed rows come to
        other numbers than its own forward pass (`row_check`).
        """
        rows: list[Row] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            parts = self._rows(request)
            rows.extend(parts)
            owners.extend([index] * len(parts))
        check_tokens(self.loaded.model, rows)
        logprobs: list[list[float]] = [[] for _ in requests]
        for start in range(0, len(rows), ROWS_PER_CALL):
            # Around each call, and not around whoever listens to the progress.
            with elementwise_of_run(self.loaded.model, compiled=False):
                scored = evaluate_rows(self.loaded.model, rows[start : start + ROWS_PER_CALL], self.max_tokens_per_pack)
            for owner, row_logprobs in zip(owners[start:], scored):
                logprobs[owner].extend(row_logprobs.tolist())
            if on_progress:
                following = start + ROWS_PER_CALL
                on_progress(owners[following] if following < len(rows) else len(requests), len(requests))
        return [TokenScores(tuple(values), len(request.text.encode())) for request, values in zip(requests, logprobs)]

    @property
    def _context(self) -> int:
        return room_for_text(self.loaded, soft_prompt_of(self.loaded.model))

    def _rows(self, request: ScoreRequest) -> list[Row]:
        if not request.messages:
            return raw_text_rows(replace(self.loaded, max_seq_length=self._context), [request.text])[0]
        encoded = self.loaded.chat.encode(request.messages, request.text)
        ids, weights, context = encoded.input_ids, encoded.weights, self._context
        longest_prompt = max(1, context - encoded.num_answer_tokens)
        surplus = max(0, len(ids) - encoded.num_answer_tokens - longest_prompt)
        rows = []
        for start in range(surplus, len(ids) - 1, context - 1):
            part = weights[start : start + context].copy()
            part[0] = 0.0
            rows.append(Row(ids[start : start + context], part))
        return rows


def mean_row_loss(model: PreTrainedModel, rows: Sequence[Row], max_tokens: int) -> float:
    """Nats per token with loss over all rows together, in packs of at most `max_tokens`."""
    return -float(torch.cat(evaluate_rows(model, rows, max_tokens)).double().mean())
