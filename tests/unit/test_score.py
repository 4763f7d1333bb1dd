"""The local Scorer against log-softmax by hand, for answers and for raw text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from parity.tolerances import PLANTED_FACTOR, allowed

from giong.contracts import Message, Scorer, ScoreRequest, TokenScores
from giong.engine.score import LocalScorer, mean_row_loss
from giong.models.rows import raw_text_rows

MESSAGES = (Message("system", "Be brief."), Message("user", "Say that the kettle is on."))
TEXT = "The kettle sang 🦊 before anyone had asked it to.\n"


@torch.no_grad()
def logprobs_by_hand(model: torch.nn.Module, ids: list[int], start: int) -> list[float]:
    """Log-probability of every token from `start` on, given all before it."""
    logprobs = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return [float(logprobs[place - 1, ids[place]]) for place in range(start, len(ids))]


def largest_difference(left: tuple[float, ...], right: list[float]) -> float:
    assert len(left) == len(right)
    return max(abs(a - b) for a, b in zip(left, right))


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt2"])
def test_answers_and_raw_texts_are_scored_as_by_hand(tiny_model: Callable, family: str):
    loaded = tiny_model(family)
    scorer = LocalScorer(loaded, max_tokens_per_pack=64)
    assert isinstance(scorer, Scorer)
    progress: list[tuple[int, int]] = []
    requests = [ScoreRequest(TEXT, MESSAGES), ScoreRequest(TEXT), ScoreRequest("Yes.", MESSAGES), ScoreRequest("")]
    scores = scorer.score(requests, lambda done, total: progress.append((done, total)))
    for score, request in zip(scores, requests, strict=True):
        if request.messages:
            encoded = loaded.chat.encode(request.messages, request.text)
            ids, start = encoded.input_ids.tolist(), len(encoded.input_ids) - encoded.num_answer_tokens
        else:
            ids, start = [*loaded.tokenizer(request.text, add_special_tokens=False)["input_ids"], loaded.tokenizer.eos_token_id], 1
        by_hand = logprobs_by_hand(loaded.model, ids, start)
        if not by_hand:
            assert score == TokenScores((), 0)
            continue
        assert largest_difference(score.logprobs, by_hand) < allowed("scores")
        assert score.num_bytes == len(request.text.encode())
        assert score.nll == pytest.approx(-sum(by_hand), abs=len(by_hand) * allowed("scores"))
        # Planted: the log-probabilities of one token later.
        assert largest_difference(score.logprobs[1:], by_hand[:-1]) > PLANTED_FACTOR * allowed("scores")
    assert progress[-1] == (4, 4)


def test_order_and_packing_do_not_matter(tiny_model: Callable):
    loaded = tiny_model("qwen2")
    requests = [ScoreRequest(f"{TEXT} {number}" * (1 + number % 3), MESSAGES if number % 2 else ()) for number in range(70)]
    together = LocalScorer(loaded, max_tokens_per_pack=2048).score(requests)
    alone = LocalScorer(loaded, max_tokens_per_pack=1).score(requests[::-1])[::-1]
    for left, right in zip(together, alone, strict=True):
        assert largest_difference(left.logprobs, list(right.logprobs)) < allowed("scores")


def test_a_raw_text_longer_than_the_context_is_predicted_once_per_token(tiny_model: Callable):
    """Parts of 16 tokens overlap by one, which is context in the second part and not predicted again."""
    loaded = replace(tiny_model("llama"), max_seq_length=16)
    text = TEXT * 4
    ids = [*loaded.tokenizer(text, add_special_tokens=False)["input_ids"], loaded.tokenizer.eos_token_id]
    assert len(ids) > 4 * 16
    rows, report = raw_text_rows(loaded, [text])
    predicted = [int(token) for row in rows for token, weight in zip(row.input_ids, row.weights) if weight]
    assert predicted == ids[1:]
    assert max(len(row) for row in rows) == 16
    assert report.num_loss_tokens == len(ids) - 1
    score = LocalScorer(loaded).score([ScoreRequest(text)])[0]
    by_hand = [value for start in range(0, len(ids) - 1, 15) for value in logprobs_by_hand(loaded.model, ids[start : start + 16], 1)]
    assert largest_difference(score.logprobs, by_hand) < allowed("scores")


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32])
def test_no_length_of_raw_text_loses_or_doubles_a_token(tiny_model: Callable, length: int):
    loaded = replace(tiny_model("gpt2"), max_seq_length=16)
    text = "!" * 400
    while len(loaded.tokenizer(text)["input_ids"]) > length - 1:
        text = text[:-1]
    ids = [*loaded.tokenizer(text)["input_ids"], loaded.tokenizer.eos_token_id]
    assert len(ids) == length
    rows, _ = raw_text_rows(loaded, [text])
    assert [int(token) for row in rows for token, weight in zip(row.input_ids, row.weights) if weight] == ids[1:]


def test_a_request_that_does_not_fit_loses_its_beginning_and_a_longer_answer_is_scored_in_parts(tiny_model: Callable):
    loaded = tiny_model("qwen2")
    encoded = loaded.chat.encode(MESSAGES, TEXT)
    ids, answer = encoded.input_ids.tolist(), encoded.num_answer_tokens
    short = replace(loaded, max_seq_length=answer + 5)
    score = LocalScorer(short).score([ScoreRequest(TEXT, MESSAGES)])[0]
    assert largest_difference(score.logprobs, logprobs_by_hand(loaded.model, ids[-answer - 5 :], 5)) < allowed("scores")
    # One token of the request is left, and the parts overlap by one, so that every token of the answer is predicted once.
    score = LocalScorer(replace(loaded, max_seq_length=16)).score([ScoreRequest(TEXT, MESSAGES)])[0]
    tail = ids[-answer - 1 :]
    by_hand = [value for start in range(0, len(tail) - 1, 15) for value in logprobs_by_hand(loaded.model, tail[start : start + 16], 1)]
    assert len(by_hand) == answer > 16
    assert largest_difference(score.logprobs, by_hand) < allowed("scores")


def test_the_mean_loss_of_rows_is_per_token(tiny_model: Callable):
    """Over all rows together: the mean of the rows' own means is another number."""
    loaded = tiny_model("qwen2")
    rows, _ = raw_text_rows(loaded, [TEXT, "Yes."])
    by_hand = [logprobs_by_hand(loaded.model, row.input_ids.tolist(), 1) for row in rows]
    expected = -sum(map(sum, by_hand)) / sum(map(len, by_hand))
    assert mean_row_loss(loaded.model, rows, 64) == pytest.approx(expected, abs=allowed("scores"))
    of_means = -sum(sum(row) / len(row) for row in by_hand) / len(by_hand)
    assert abs(of_means - expected) > PLANTED_FACTOR * allowed("scores")
