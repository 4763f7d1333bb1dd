"""Decode several prompts together: left padding, one key-value cache, finished rows leave the batch at once.

What all prompts begin with (an instruction, few-shot examples) is computed once and its cache shared. Each request draws
from a generator of its own, so an answer does not depend on what else is in the batch (up to rounding of the kernels).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, PreTrainedModel

from giong.contracts import FinishReason, Sampling
from giong.generation.cache import make_cache

MIN_SHARED_PREFIX_TOKENS = 32
"""A shared beginning shorter than this is not worth a pass of its own."""


@dataclass(slots=True)
class Generation:
    """One answer under way; `finish_reason` is None while it grows."""

    prompt: list[int]
    sampling: Sampling
    index: int
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None


OnToken = Callable[[int, int | None, FinishReason | None], None]
"""Called with (index of the request, token or None, finish reason or None) as answers grow."""


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    end_token_ids: Sequence[int],
    *,
    on_token: OnToken | None = None,
    cancelled: Callable[[int], bool] = lambda index: False,
) -> list[Generation]:
    """Answer all prompts as one batch; token lists exclude the end token. Prompts must not be empty."""
    sequences = [
        Generation(list(prompt), sampling, index, torch.Generator().manual_seed(sampling.seed))
        for index, (prompt, sampling) in enumerate(zip(prompts, samplings))
    ]
    ends = frozenset(end_token_ids)
    active = [sequence for sequence in sequences if sequence.sampling.max_new_tokens > 0]
    for sequence in sequences:
        if sequence.sampling.max_new_tokens <= 0:
            sequence.finish_reason = "length"
    if not active:
        return sequences
    longest = max(len(sequence.prompt) for sequence in active) + max(sequence.sampling.max_new_tokens for sequence in active)
    cache, mask, logits = _prefill(model, [sequence.prompt for sequence in active], longest)
    positions = torch.tensor([len(sequence.prompt) for sequence in active], device=model.device)
    while True:
        chosen = _draw(logits, active)
        for sequence, token in zip(active, chosen):
            _advance(sequence, token, ends, on_token, cancelled)
        keep = [row for row, sequence in enumerate(active) if sequence.finish_reason is None]
        if not keep:
            return sequences
        if len(keep) < len(active):
            rows = torch.tensor(keep, device=model.device)
            cache.batch_select_indices(rows)
            mask, positions = mask[rows], positions[rows]
            active = [active[row] for row in keep]
        mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
        step = torch.tensor([[sequence.tokens[-1]] for sequence in active], device=model.device)
        output = model(input_ids=step, attention_mask=mask, position_ids=positions[:, None], past_key_values=cache, use_cache=True)
        logits = output.logits[:, -1].float()
        positions = positions + 1


def _prefill(model: PreTrainedModel, prompts: list[list[int]], longest: int) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
    """Run the prompts; returns cache, attention mask (rows, tokens) and the logits after each prompt's last token.

    `longest` is the number of tokens that a sequence may reach.
    """
    count = len(prompts)
    cache = make_cache(model)
    # A sliding window counts the padding between the shared beginning and a shorter rest as if it were text.
    slides = any(layer.is_sliding and layer.sliding_window < longest for layer in cache.layers)
    shared = 0 if slides and len({len(prompt) for prompt in prompts}) > 1 else _shared_prefix(prompts)
    if shared:
        prefix = torch.tensor([prompts[0][:shared]], device=model.device)
        model(input_ids=prefix, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if count > 1:
            cache = copy.copy(cache)
            cache.batch_repeat_interleave(count)
    rests = [prompt[shared:] for prompt in prompts]
    longest = max(len(rest) for rest in rests)
    ids = torch.zeros(count, longest, dtype=torch.long)
    mask = torch.zeros(count, shared + longest, dtype=torch.long)
    positions = torch.zeros(count, longest, dtype=torch.long)
    mask[:, :shared] = 1
    for row, rest in enumerate(rests):
        ids[row, longest - len(rest) :] = torch.tensor(rest)
        mask[row, shared + longest - len(rest) :] = 1
        positions[row, longest - len(rest) :] = torch.arange(shared, shared + len(rest))
    ids, mask, positions = (tensor.to(model.device) for tensor in (ids, mask, positions))
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache, mask, output.logits[:, -1].float()


def _shared_prefix(prompts: list[list[int]]) -> int:
    """Length of the common beginning; every prompt keeps at least one token of its own."""
    first, last = min(prompts), max(prompts)
    limit = min(len(prompt) for prompt in prompts) - 1
    shared = next((position for position, (a, b) in enumerate(zip(first, last)) if a != b), limit)
    shared = min(shared, limit)
    return shared if shared >= MIN_SHARED_PREFIX_TOKENS and len(prompts) > 1 else 0


def _draw(logits: torch.Tensor, active: list[Generation]) -> list[int]:
    greedy = None
    chosen: list[int] = []
    for row, sequence in enumerate(active):
        sampling = sequence.sampling
        if sampling.temperature == 0 and sampling.repetition_penalty == 1.0:
            greedy = logits.argmax(-1).tolist() if greedy is None else greedy
            chosen.append(greedy[row])
            continue
        scores = logits[row].clone()
        if sampling.repetition_penalty != 1.0 and sequence.tokens:
            seen = torch.tensor(sorted(set(sequence.tokens)), device=scores.device)
            values = scores[seen]
            scores[seen] = torch.where(values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty)
        chosen.append(int(scores.argmax()) if sampling.temperature == 0 else _sample(scores, sampling, sequence.generator))
    return chosen


def _sample(scores: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Temperature, then top-k, then nucleus (Holtzman et al. 2020, 1904.09751, section 3.1)."""
    scores = scores / sampling.temperature
    if sampling.top_k:
        threshold = scores.topk(min(sampling.top_k, len(scores))).values[-1]
        scores = scores.masked_fill(scores < threshold, float("-inf"))
    probabilities = scores.softmax(-1)
    if sampling.top_p < 1.0:
        ordered, order = probabilities.sort(descending=True)
        # A token stays while the mass before it is below top_p, so the most probable one always stays.
        probabilities = probabilities.scatter(0, order, torch.where(ordered.cumsum(0) - ordered < sampling.top_p, ordered, 0.0))
    return int(torch.multinomial(probabilities.cpu(), 1, generator=generator))


def _advance(sequence: Generation, token: int, ends: frozenset[int], on_token: OnToken | None, cancelled: Callable[[int], bool]) -> None:
    if token in ends:
        sequence.finish_reason = "stop"
    else:
        sequence.tokens.append(token)
        if len(sequence.tokens) >= sequence.sampling.max_new_tokens or cancelled(sequence.index):
            sequence.finish_reason = "length"
    if on_token:
        on_token(sequence.index, None if token in ends else token, sequence.finish_reason)


def batches(lengths: Sequence[int], max_rows: int, max_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of at most `max_rows` rows and `max_tokens` padded tokens, alike lengths together, longest first."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        num_rows = max(1, min(max_rows, max_tokens // max(1, lengths[order[start]])))
        yield order[start : start + num_rows]
        start += num_rows
