"""Decode several prompts together: left padding, one key-value cache. Finished rows leave the batch, waiting ones take their places.

What all prompts begin with (an instruction, few-shot examples) is computed once and its cache shared. Each request draws
from a generator of its own, so an answer does not depend on what else is in the batch (up to rounding of the kernels).
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, PreTrainedModel

from giong.contracts import FinishReason, Sampling
from giong.generation.cache import can_grow, join_rows, keep_rows, make_cache, soft_prompt_cache

MIN_SHARED_PREFIX_TOKENS = 32
"""A shared beginning shorter than this is not worth a pass of its own."""
FREE_SHARE = 4
"""Waiting prompts that are all there from the start join once so great a part (1/4) of the rows is free: each joining copies the cache."""


@dataclass(slots=True)
class Generation:
    """One answer under way; `finish_reason` is None while it grows."""

    prompt: list[int]
    sampling: Sampling
    index: int
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def max_tokens(self) -> int:
        """How long prompt and answer may become together."""
        return len(self.prompt) + self.sampling.max_new_tokens


@dataclass(frozen=True, slots=True)
class Room:
    """What is decoded together at most: rows, tokens of prompts that are read at once, and tokens in the cache (rows times the longest
    that one of them may become)."""

    max_rows: int = 32
    max_prompt_tokens: int = 16_384
    max_cache_tokens: int = 49_152


DEFAULT_ROOM = Room()
NUCLEUS_TOKENS = 256
"""Most probable tokens among which a nucleus is looked for before the whole vocabulary is sorted."""

OnToken = Callable[[int, int | None, FinishReason | None], None]
"""Called with (index of the request, token or None, finish reason or None) as answers grow."""
Join = Callable[[int], Iterable[tuple[Sequence[int], Sampling]]]
"""Asked, between two tokens, for at most so many further prompts; their indices go on from those that there are."""


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    end_token_ids: Sequence[int],
    *,
    room: Room = DEFAULT_ROOM,
    on_token: OnToken | None = None,
    cancelled: Callable[[int], bool] = lambda index: False,
    join: Join | None = None,
) -> list[Generation]:
    """Answer all prompts, longest first; token lists exclude the end token. Prompts must not be empty.

    Prompts that `join` brings are answered too, as soon as a row is free for them.
    """
    sequences: list[Generation] = []
    waiting: deque[Generation] = deque()

    def enter(arrivals: Iterable[tuple[Sequence[int], Sampling]]) -> None:
        for prompt, sampling in arrivals:
            sequence = Generation(list(prompt), sampling, len(sequences), torch.Generator().manual_seed(sampling.seed))
            sequences.append(sequence)
            if sampling.max_new_tokens > 0:
                waiting.append(sequence)
            else:
                sequence.finish_reason = "length"

    enter(zip(prompts, samplings))
    waiting = deque(sorted(waiting, key=lambda sequence: -len(sequence.prompt)))
    batch = _Batch(model, room, [sequence.prompt for sequence in waiting])
    ends = frozenset(end_token_ids)
    while True:
        if join and not waiting and (free := batch.num_free):
            enter(join(free))
        batch.admit(waiting, at_once=join is not None)
        if not batch.active:
            return sequences
        for sequence, token in zip(batch.active, _draw(batch.logits, batch.active)):
            _advance(sequence, token, ends, on_token, cancelled)
        batch.step()


class _Batch:
    """The answers under way, a row each: `active` with `logits` (rows, vocabulary) from which their next tokens are drawn."""

    def __init__(self, model: PreTrainedModel, room: Room, prompts: list[list[int]]) -> None:
        self.model, self.room = model, room
        self.active: list[Generation] = []
        self._beginning = prompts[0][: _shared_prefix(prompts)] if prompts else []
        self._beginning_cache: DynamicCache | None = None
        self._start, self._num_virtual = soft_prompt_cache(model)

    @property
    def num_free(self) -> int:
        """Rows that could join now. Where a layer's window slides, nobody joins those who are under way."""
        return self.room.max_rows - len(self.active) if not self.active or can_grow(self._cache) else 0

    def admit(self, waiting: deque[Generation], *, at_once: bool) -> None:
        """Take from `waiting` who fits, unless so few fit that it is better to wait for more."""
        chosen: list[Generation] = []
        while waiting and len(chosen) < self.num_free and self._fits([*chosen, waiting[0]]) and self._can_stand_beside(waiting[0], chosen):
            chosen.append(waiting.popleft())
        wanted = 1 if at_once or not self.active else min(len(chosen) + len(waiting), max(1, self.room.max_rows // FREE_SHARE))
        if len(chosen) < wanted:
            waiting.extendleft(reversed(chosen))
        elif chosen:
            self._add(chosen)

    def _fits(self, chosen: list[Generation]) -> bool:
        longest = self._num_virtual + max(sequence.max_tokens for sequence in [*self.active, *chosen])
        prompt_tokens = len(chosen) * max(len(sequence.prompt) for sequence in chosen)
        fits = prompt_tokens <= self.room.max_prompt_tokens and longest * (len(self.active) + len(chosen)) <= self.room.max_cache_tokens
        return fits or (not self.active and len(chosen) == 1)

    def _can_stand_beside(self, newcomer: Generation, chosen: list[Generation]) -> bool:
        # Between virtual tokens and a shorter prompt there would be padding, which a sliding window counts as if it were text.
        equal = not chosen or len(chosen[0].prompt) == len(newcomer.prompt)
        return equal or not self._num_virtual or not self._slides(max(sequence.max_tokens for sequence in [*chosen, newcomer]))

    def _slides(self, longest: int) -> bool:
        """Whether some layer's window is shorter than the virtual tokens and `longest` of a row's own."""
        layers = make_cache(self.model).layers
        return any(layer.is_sliding and layer.sliding_window < self._num_virtual + longest for layer in layers)

    def _add(self, chosen: list[Generation]) -> None:
        prompts = [sequence.prompt for sequence in chosen]
        shared, beginning = self._shared(prompts, max(sequence.max_tokens for sequence in chosen))
        cache, mask, logits = _prefill(self.model, prompts, shared, beginning, self._num_virtual)
        positions = torch.tensor([self._num_virtual + len(prompt) for prompt in prompts], device=self.model.device)
        if not self.active:
            self.active, self._cache, self._mask, self._positions, self.logits = chosen, cache, mask, positions, logits
            return
        join_rows(self._cache, cache)
        width = max(self._mask.shape[1], mask.shape[1])
        self._mask = torch.cat([torch.nn.functional.pad(part, (width - part.shape[1], 0)) for part in (self._mask, mask)])
        self._positions = torch.cat([self._positions, positions])
        self.logits = torch.cat([self.logits, logits])
        self.active = [*self.active, *chosen]

    def _shared(self, prompts: list[list[int]], longest: int) -> tuple[int, DynamicCache | None]:
        """How many tokens the prompts begin with together, and the cache of these, of a single row."""
        size = len(self._beginning)
        known = size and all(len(prompt) > size and prompt[:size] == self._beginning for prompt in prompts)
        shared = size if known else _shared_prefix(prompts)
        # A sliding window counts the padding between the shared beginning and a shorter rest as if it were text.
        if not shared or (self._slides(longest) and len({len(prompt) for prompt in prompts}) > 1):
            return 0, self._start
        if known and self._beginning_cache is not None:
            return shared, self._beginning_cache
        cache = make_cache(self.model) if self._start is None else copy.deepcopy(self._start)
        prefix = torch.tensor([prompts[0][:shared]], device=self.model.device)
        self.model(input_ids=prefix, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if known:
            self._beginning_cache = cache
        return shared, cache

    def step(self) -> None:
        """Let the finished rows go and compute what the others go on with."""
        keep = [row for row, sequence in enumerate(self.active) if sequence.finish_reason is None]
        if len(keep) < len(self.active):
            self.active = [self.active[row] for row in keep]
            if not keep:
                return
            rows = torch.tensor(keep, device=self.model.device)
            self._mask, self._positions = self._mask[rows], self._positions[rows]
            # With those who leave may go the room that only they needed.
            unused = int(self._mask.any(0).to(torch.uint8).argmax()) if can_grow(self._cache) else 0
            keep_rows(self._cache, rows, unused)
            self._mask = self._mask[:, unused:]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self.active), 1)], dim=1)
        tokens = torch.tensor([[sequence.tokens[-1]] for sequence in self.active], device=self.model.device)
        output = self.model(
            input_ids=tokens, attention_mask=self._mask, position_ids=self._positions[:, None], past_key_values=self._cache, use_cache=True
        )
        self.logits = output.logits[:, -1].float()
        self._positions = self._positions + 1


def _prefill(
    model: PreTrainedModel, prompts: list[list[int]], shared: int, beginning: DynamicCache | None, num_virtual: int
) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
    """Run the prompts, of which the first `shared` tokens lie in `beginning`, behind `num_virtual` of a soft prompt.

    Returns cache, attention mask (rows, tokens) and the logits after each prompt's last token.
    """
    count = len(prompts)
    if beginning is None:
        cache = make_cache(model)
    else:
        cache = copy.deepcopy(beginning)
        cache.batch_repeat_interleave(count)
    rests = [prompt[shared:] for prompt in prompts]
    longest, known = max(len(rest) for rest in rests), num_virtual + shared
    ids = torch.zeros(count, longest, dtype=torch.long)
    mask = torch.zeros(count, known + longest, dtype=torch.long)
    positions = torch.zeros(count, longest, dtype=torch.long)
    mask[:, :known] = 1
    for row, rest in enumerate(rests):
        ids[row, longest - len(rest) :] = torch.tensor(rest)
        mask[row, known + longest - len(rest) :] = 1
        positions[row, longest - len(rest) :] = torch.arange(known, known + len(rest))
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
    """The next token of each answer, from logits (rows, vocabulary)."""
    penalised = [row for row, sequence in enumerate(active) if sequence.sampling.repetition_penalty != 1.0 and sequence.tokens]
    forbidden = [(row, token) for row, sequence in enumerate(active) for token in _repeating(sequence)]
    scores = logits.clone() if penalised or forbidden else logits
    for row in penalised:
        seen = torch.tensor(sorted(set(active[row].tokens)), device=scores.device)
        values, penalty = scores[row, seen], active[row].sampling.repetition_penalty
        scores[row, seen] = torch.where(values > 0, values / penalty, values * penalty)
    for row, token in forbidden:
        scores[row, token] = float("-inf")
    drawn = [row for row, sequence in enumerate(active) if sequence.sampling.temperature > 0]
    chosen: list[int] = scores.argmax(-1).tolist() if len(drawn) < len(active) else [0] * len(active)
    if drawn:
        tokens = _sample(scores[drawn], [active[row].sampling for row in drawn], [active[row].generator for row in drawn])
        for row, token in zip(drawn, tokens):
            chosen[row] = token
    return chosen


def _repeating(sequence: Generation) -> set[int]:
    """Tokens that would end a run of `no_repeat_ngram_size` tokens which the answer has already."""
    tokens, size = sequence.tokens, sequence.sampling.no_repeat_ngram_size
    if not size or len(tokens) < size:
        return set()
    last = tokens[len(tokens) - size + 1 :]
    return {tokens[at + size - 1] for at in range(len(tokens) - size + 1) if tokens[at : at + size - 1] == last}


def _sample(scores: torch.Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator]) -> list[int]:
    """Temperature, then top-k, then nucleus (Holtzman et al. 2020, 1904.09751, section 3.1), for scores (rows, vocabulary).

    A number from the row's generator is looked up in the cumulated probabilities. A nucleus is looked for among the most probable
    tokens first: sorting the vocabulary for each token would cost as much as a small model.
    """
    scores = scores / torch.tensor([sampling.temperature for sampling in samplings], device=scores.device)[:, None]
    for row, sampling in enumerate(samplings):
        if sampling.top_k:
            threshold = scores[row].topk(min(sampling.top_k, scores.shape[1])).values[-1]
            scores[row].masked_fill_(scores[row] < threshold, float("-inf"))
    probabilities = scores.softmax(-1)
    head, head_tokens = probabilities.topk(min(NUCLEUS_TOKENS, scores.shape[1]))
    mass = head.sum(-1).tolist()
    chosen = []
    for row, (sampling, generator) in enumerate(zip(samplings, generators)):
        if sampling.top_p == 1.0:
            kept, tokens = probabilities[row], None
        else:
            in_head = mass[row] >= sampling.top_p
            kept, tokens = (head[row], head_tokens[row]) if in_head else probabilities[row].sort(descending=True)
            # A token stays while the mass before it is below top_p, so the most probable one always stays.
            kept = torch.where(kept.cumsum(0) - kept < sampling.top_p, kept, 0.0)
        cumulated = kept.double().cumsum(0)
        number = torch.rand(1, generator=generator, dtype=torch.float64).to(cumulated.device)
        place = torch.searchsorted(cumulated, number * cumulated[-1], right=True)
        chosen.append(int(place if tokens is None else tokens[place]))
    return chosen


def _advance(sequence: Generation, token: int, ends: frozenset[int], on_token: OnToken | None, cancelled: Callable[[int], bool]) -> None:
    if token in ends:
        sequence.finish_reason = "stop"
    else:
        sequence.tokens.append(token)
        if len(sequence.tokens) >= sequence.sampling.max_new_tokens or cancelled(sequence.index):
            sequence.finish_reason = "length"
    if on_token:
        on_token(sequence.index, None if token in ends else token, sequence.finish_reason)
