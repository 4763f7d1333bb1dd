"""Batched decoding against transformers' own `generate`, and each sampling setting by hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy

import pytest
import torch
from tiny_models import FAMILIES, VOCAB_SIZE

import giong.generation.decoder as decoder
from giong.contracts import Message, Predictor, Request, Sampling
from giong.errors import DataError
from giong.generation.cache import RoomyLayer
from giong.generation.decoder import Generation, Room, decode
from giong.generation.local import LocalModel

NEW_TOKENS = 20


def prompts_of(lengths: Sequence[int], prefix: int = 0, seed: int = 0) -> list[list[int]]:
    """Random prompts that share their first `prefix` tokens."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randint(VOCAB_SIZE, (prefix,), generator=generator).tolist()
    return [shared + torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def greedy(num_tokens: int = NEW_TOKENS, **changes: object) -> Sampling:
    return Sampling(max_new_tokens=num_tokens, **changes)


def by_transformers(model: torch.nn.Module, prompts: list[list[int]], **options: object) -> list[list[int]]:
    """Every prompt alone, greedily, without any end token."""
    answers = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            max_new_tokens=NEW_TOKENS, eos_token_id=-1, pad_token_id=0, **options,
        )  # fmt: skip
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def tokens(generations: list[Generation]) -> list[list[int]]:
    return [generation.tokens for generation in generations]


SLIDING = ("mistral", "gemma2")


@pytest.mark.parametrize("family", SLIDING)
def test_a_sliding_window_and_a_shared_beginning(tiny_model: Callable, family: str, monkeypatch: pytest.MonkeyPatch):
    """Padding after a shared beginning would use up the window, so it is only shared where there is none, or no window."""
    model = tiny_model(family).model
    equal, unequal = prompts_of((9, 9, 9), prefix=40), prompts_of((3, 17, 9, 1, 30), prefix=40)
    assert tokens(decode(model, equal, [greedy()] * 3, [])) == by_transformers(model, equal)
    wide = tiny_model(family, sliding_window=96).model
    assert tokens(decode(wide, unequal, [greedy()] * 5, [])) == by_transformers(wide, unequal)
    # Planted: sharing it all the same is seen.
    sharing = decoder._Batch._shared
    monkeypatch.setattr(decoder._Batch, "_shared", lambda batch, prompts, longest: sharing(batch, prompts, 0))
    assert tokens(decode(model, unequal, [greedy()] * 5, [])) != by_transformers(model, unequal)


# Prompts and answers together pass the sliding window of the Mistral and Gemma 2 twins (12 tokens).
@pytest.mark.parametrize("prefix", [0, 40], ids=["nothing shared", "40 tokens shared"])
@pytest.mark.parametrize("family", [*FAMILIES, "neox"])
def test_greedy_decoding_equals_transformers(tiny_model: Callable, family: str, prefix: int, monkeypatch: pytest.MonkeyPatch):
    model = tiny_model(family).model
    prompts = prompts_of((3, 17, 9, 1, 30), prefix)
    shared: list[int] = []
    sharing = decoder._Batch._shared

    def counting(batch: decoder._Batch, *given: object) -> object:
        found = sharing(batch, *given)
        shared.append(found[0])
        return found

    monkeypatch.setattr(decoder._Batch, "_shared", counting)
    expected = by_transformers(model, prompts)
    assert len({token for answer in expected for token in answer}) > 10
    assert tokens(decode(model, prompts, [greedy()] * 5, [])) == expected
    assert shared == [0 if family in SLIDING else prefix]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_wrong_positions_would_be_seen(tiny_model: Callable, family: str, monkeypatch: pytest.MonkeyPatch):
    """The planted error: what follows the shared beginning is computed as if it stood three tokens later."""
    model = tiny_model(family).model
    prompts = prompts_of((3, 17, 9), prefix=40)
    right = by_transformers(model, prompts)
    true_forward = model.forward

    def forward(*arguments: object, position_ids: torch.Tensor | None = None, **options: object) -> object:
        return true_forward(*arguments, position_ids=None if position_ids is None else position_ids + 3, **options)

    monkeypatch.setattr(model, "forward", forward)
    assert tokens(decode(model, prompts, [greedy()] * 3, [])) != right


def test_one_prompt_and_equal_prompts(tiny_model: Callable):
    model = tiny_model("qwen2").model
    prompts = prompts_of((0, 0, 0), prefix=50)
    expected = by_transformers(model, prompts[:1])[0]
    assert tokens(decode(model, prompts, [greedy()] * 3, [])) == [expected] * 3
    assert tokens(decode(model, prompts[:1], [greedy()], [])) == [expected]


def test_the_shared_beginning_leaves_every_prompt_a_token():
    long = list(range(100, 140))
    assert decoder._shared_prefix([[*long, 1], [*long, 2, 3]]) == 40
    assert decoder._shared_prefix([[*long], [*long]]) == 39
    assert decoder._shared_prefix([long[:20], long]) == 0
    assert decoder._shared_prefix([long]) == 0


def test_an_end_token_stops_its_answer_only(tiny_model: Callable):
    """The end token is not part of the answer, and who goes on alone goes on as before."""
    model = tiny_model("llama").model
    prompts = prompts_of((3, 17, 9))
    free = by_transformers(model, prompts)
    end = free[1][5]
    cut = [answer[: answer.index(end)] if end in answer else answer for answer in free]
    assert len({len(answer) for answer in cut}) > 1
    generations = decode(model, prompts, [greedy()] * 3, [end])
    assert tokens(generations) == cut
    assert [generation.finish_reason for generation in generations] == ["stop" if len(answer) < NEW_TOKENS else "length" for answer in cut]


def test_max_new_tokens_is_each_requests_own(tiny_model: Callable):
    """Rows that are finished leave the batch one after another; nobody else notices."""
    model = tiny_model("gemma2").model
    prompts = prompts_of((3, 17, 9, 5, 30), prefix=33)
    free = by_transformers(model, prompts)
    wanted = [4, 20, 1, 0, 11]
    generations = decode(model, prompts, [greedy(number) for number in wanted], [])
    assert tokens(generations) == [answer[:number] for answer, number in zip(free, wanted)]
    assert {generation.finish_reason for generation in generations} == {"length"}


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_the_repetition_penalty_looks_at_the_answer_only(tiny_model: Callable, penalty: float):
    """By hand, without a cache: logits of tokens in the answer so far are divided, or multiplied where negative."""
    model = tiny_model("qwen2").model
    prompts = prompts_of((12, 30))
    expected = []
    for prompt in prompts:
        answer: list[int] = []
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, -1]
            for token in set(answer):
                logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            answer.append(int(logits.argmax()))
        expected.append(answer)
    assert tokens(decode(model, prompts, [greedy(repetition_penalty=penalty)] * 2, [])) == expected
    assert expected != by_transformers(model, prompts)
    # Planted: transformers counts the prompt too.
    assert by_transformers(model, prompts, repetition_penalty=penalty) != expected


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_run_of_tokens_comes_twice_in_an_answer(tiny_model: Callable, size: int):
    """By hand, without a cache: the likeliest token that does not end a run which the answer has already."""
    model = deepcopy(tiny_model("qwen2").model)
    # A few loud tokens, so that answers repeat themselves.
    model.lm_head.weight.data[:5] *= 20
    prompts = prompts_of((12, 30))
    found = tokens(decode(model, prompts, [greedy(no_repeat_ngram_size=size)] * 2, []))
    for prompt, answer in zip(prompts, found):
        expected: list[int] = []
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + expected])).logits[0]
            taken = {tuple(expected[at : at + size]) for at in range(len(expected) - size + 1)}
            order = logits[-1].argsort(descending=True).tolist()
            expected.append(next(token for token in order if (*expected[len(expected) - size + 1 :], token) not in taken))
        assert answer == expected
    assert found != by_transformers(model, prompts)
    # Planted: transformers counts the prompt too.
    if size == 1:
        assert by_transformers(model, prompts, no_repeat_ngram_size=size) != found


# ---- joining a batch that is under way ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 40], ids=["nothing shared", "40 tokens shared"])
@pytest.mark.parametrize("family", [*FAMILIES, "neox"])
def test_whoever_joins_gets_the_answer_it_would_get_alone(tiny_model: Callable, family: str, prefix: int, monkeypatch: pytest.MonkeyPatch):
    """Two rows for seven prompts, with answers of unlike lengths, so that rows are taken over in the middle of another answer.

    Where a window slides nobody joins: the next ones begin when both rows are free.
    """
    model = tiny_model(family).model
    prompts = prompts_of((3, 17, 9, 1, 30, 4, 12), prefix)
    wanted = [20, 4, 1, 13, 7, 20, 2]
    joined: list[int] = []
    true_join = decoder.join_rows
    monkeypatch.setattr(decoder, "join_rows", lambda cache, other: joined.append(1) or true_join(cache, other))
    expected = [answer[:number] for answer, number in zip(by_transformers(model, prompts), wanted)]
    found = decode(model, prompts, [greedy(number) for number in wanted], [], room=Room(max_rows=2))
    assert tokens(found) == expected
    assert bool(joined) == (family not in SLIDING)


def test_a_prompt_that_comes_while_others_are_answered_is_answered_beside_them(tiny_model: Callable):
    model = tiny_model("llama").model
    first, late, unlike = prompts_of((9, 40, 3))
    coming, heard = [[(late, greedy(6))], [(unlike, greedy(3)), (first, greedy(2))]], []

    def join(num_free: int) -> list[tuple[list[int], Sampling]]:
        # Asked before each token; the first at the fourth, the others at once.
        return coming.pop(0) if len(heard) >= 3 and num_free >= 2 and coming else []

    found = decode(model, [first], [greedy()], [], room=Room(max_rows=4), join=join, on_token=lambda index, *_: heard.append(index))
    expected = [by_transformers(model, [prompt])[0] for prompt in (first, late, unlike, first)]
    assert tokens(found) == [answer[:number] for answer, number in zip(expected, (NEW_TOKENS, 6, 3, 2))]
    assert heard[:4] == [0, 0, 0, 0] and heard.index(1) < NEW_TOKENS and heard[-1] == 0


@pytest.mark.parametrize("fault", ["padding", "rows", "mask"])
def test_a_faulty_joining_is_seen(tiny_model: Callable, fault: str, monkeypatch: pytest.MonkeyPatch):
    """Planted: padded on the right; the wrong rows kept; the padding of the shorter part taken for text."""
    model = tiny_model("qwen2").model
    prompts = prompts_of((3, 30, 9, 1, 17))
    right = by_transformers(model, prompts)

    def append(layer: RoomyLayer, other: RoomyLayer) -> None:
        width = max(layer.keys.shape[-2], other.keys.shape[-2])
        layer.keys, layer.values = (
            torch.cat([torch.nn.functional.pad(part, (0, 0, 0, width - part.shape[-2])) for part in parts])
            for parts in ((layer.keys, other.keys), (layer.values, other.values))
        )

    true_keep, true_pad = RoomyLayer.keep, torch.nn.functional.pad
    if fault == "padding":
        monkeypatch.setattr(RoomyLayer, "append", append)
    elif fault == "rows":
        monkeypatch.setattr(RoomyLayer, "keep", lambda layer, rows, first: true_keep(layer, torch.arange(len(rows)), first))
    else:
        monkeypatch.setattr(torch.nn.functional, "pad", lambda part, sizes, **options: true_pad(part, sizes, value=1))
    wanted = [greedy(number) for number in (4, 20, 20, 20, 20)]
    found = tokens(decode(model, prompts, wanted, [], room=Room(max_rows=2)))
    assert found != [answer[: sampling.max_new_tokens] for answer, sampling in zip(right, wanted)]


def test_room_bounds_rows_prompts_and_cache(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    read: list[int] = []
    true_prefill = decoder._prefill
    monkeypatch.setattr(decoder, "_prefill", lambda model, prompts, *rest: read.append(len(prompts)) or true_prefill(model, prompts, *rest))
    model = tiny_model("llama").model
    prompts = prompts_of((20, 20, 20, 20, 20, 20))
    for room, expected in (
        (Room(max_rows=4), [4, 2]), (Room(max_prompt_tokens=60), [3, 3]), (Room(max_cache_tokens=70), [2, 2, 2]),
        # One alone may be longer than all bounds: it has to be answered.
        (Room(max_prompt_tokens=5, max_cache_tokens=5), [1] * 6),
    ):  # fmt: skip
        read.clear()
        assert len(set(map(len, tokens(decode(model, prompts, [greedy(10)] * 6, [], room=room))))) == 1
        assert read == expected


def test_room_that_nobody_needs_any_more_is_given_back(tiny_model: Callable):
    """A long prompt leaves; who goes on has short ones, and with it goes the padding that the long one had brought."""
    model = tiny_model("llama").model
    widths: list[int] = []
    true_forward = model.forward

    def forward(*arguments: object, attention_mask: torch.Tensor, **options: object) -> object:
        widths.append(attention_mask.shape[1])
        return true_forward(*arguments, attention_mask=attention_mask, **options)

    model.forward = forward
    try:
        decode(model, prompts_of((200, 5)), [greedy(2), greedy(6)], [])
    finally:
        del model.forward
    assert widths == [200, 201, 7, 8, 9, 10]


# ---- sampling --------------------------------------------------------------------------------------------------------


def test_sampling_repeats_by_seed_whatever_else_is_in_the_batch(tiny_model: Callable):
    model = tiny_model("llama").model
    prompts = prompts_of((3, 17, 9, 30))
    samplings = [Sampling(temperature=0.9, top_p=0.95, max_new_tokens=NEW_TOKENS, seed=seed) for seed in (5, 6, 7, 8)]
    together = tokens(decode(model, prompts, samplings, []))
    assert tokens(decode(model, prompts, samplings, [])) == together
    for prompt, sampling, answer in zip(prompts, samplings, together):
        assert tokens(decode(model, [prompt], [sampling], [])) == [answer]
    backwards = tokens(decode(model, prompts[::-1], samplings[::-1], []))
    assert backwards[::-1] == together
    others = [Sampling(temperature=0.9, max_new_tokens=NEW_TOKENS, seed=seed + 100) for seed in range(4)]
    assert tokens(decode(model, prompts, others, [])) != together


def draws(logits: list[float], count: int = 4000, **settings: float) -> dict[int, float]:
    """Shares of the tokens drawn."""
    sampling, generator = Sampling(**settings), torch.Generator().manual_seed(0)
    counted = Counter(decoder._sample(torch.tensor([logits]), [sampling], [generator])[0] for _ in range(count))
    return {token: number / count for token, number in sorted(counted.items())}


# Probabilities 0.5, 0.25, 0.15, 0.1. A share of 4000 draws has a standard error of at most 0.008: 0.03 is almost four.
SHARES = [0.5, 0.25, 0.15, 0.1]
LOGITS = [math.log(share) for share in SHARES]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0}, SHARES),
        # Squares 0.25, 0.0625, 0.0225, 0.01 over their sum 0.345.
        ({"temperature": 0.5}, [0.725, 0.181, 0.065, 0.029]),
        ({"temperature": 1.0, "top_k": 2}, [2 / 3, 1 / 3]),
        ({"temperature": 1.0, "top_k": 99}, SHARES),
        # The mass before the third token is 0.75, which is not below 0.75; before the second it is 0.5.
        ({"temperature": 1.0, "top_p": 0.75}, [2 / 3, 1 / 3]),
        ({"temperature": 1.0, "top_p": 0.76}, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9]),
        ({"temperature": 1.0, "top_p": 0.01}, [1.0]),
        # First the temperature, then top-k (2/3, 1/3 of squares: 0.8, 0.2), then the nucleus over what is left.
        ({"temperature": 0.5, "top_k": 2, "top_p": 0.79}, [1.0]),
        ({"temperature": 0.5, "top_k": 2, "top_p": 0.81}, [0.8, 0.2]),
    ],
)
def test_temperature_top_k_and_top_p_by_hand(settings: dict[str, float], expected: list[float]):
    found = draws(LOGITS, **settings)
    assert set(found) == set(range(len(expected)))
    assert [found[token] for token in range(len(expected))] == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.97])
def test_a_nucleus_is_the_same_wherever_it_is_looked_for(top_p: float, monkeypatch: pytest.MonkeyPatch):
    """Among the most probable tokens, or in the whole vocabulary where these do not suffice; rows of unlike settings in one batch."""
    scores = torch.randn(3, 400, generator=torch.Generator().manual_seed(1)) * torch.tensor([[0.5], [2.0], [6.0]])
    samplings = [Sampling(temperature=1.0, top_p=top_p), Sampling(temperature=0.7), Sampling(temperature=1.3, top_p=top_p, top_k=50)]

    def drawn() -> list[list[int]]:
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
        return [decoder._sample(scores, samplings, generators) for _ in range(200)]

    found = []
    for size in (1, 20, 400):
        monkeypatch.setattr(decoder, "NUCLEUS_TOKENS", size)
        found.append(drawn())
    assert found[0] == found[1] == found[2]
    for row, sampling in enumerate(samplings):
        alone = torch.Generator().manual_seed(row)
        assert [decoder._sample(scores[row : row + 1], [sampling], [alone])[0] for _ in range(200)] == [tokens[row] for tokens in found[0]]


# ---- streaming -------------------------------------------------------------------------------------------------------


def test_tokens_are_reported_one_by_one_in_the_order_in_which_they_are_drawn(tiny_model: Callable):
    model = tiny_model("llama").model
    prompts = prompts_of((17, 3))
    free = by_transformers(model, prompts)
    end = next(token for place, token in enumerate(free[0]) if place >= 4 and token not in free[0][:place] + free[1][:3])
    heard: list[tuple[int, int | None, str | None]] = []
    generations = decode(model, prompts, [greedy(), greedy(3)], [end], on_token=lambda *figures: heard.append(figures))
    first = generations[0].tokens
    assert heard[:4] == [(0, first[0], None), (1, free[1][0], None), (0, first[1], None), (1, free[1][1], None)]
    for index, generation in enumerate(generations):
        own = [(token, reason) for number, token, reason in heard if number == index]
        assert [token for token, _ in own if token is not None] == generation.tokens
        assert [reason for _, reason in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1][1] == generation.finish_reason
    assert heard[-1] == (0, None, "stop")


def test_a_cancelled_answer_stops_and_the_others_go_on(tiny_model: Callable):
    model = tiny_model("llama").model
    prompts = prompts_of((3, 17))
    free = by_transformers(model, prompts)
    heard: list[int] = []
    generations = decode(
        model, prompts, [greedy()] * 2, [], on_token=lambda index, token, reason: heard.append(index),
        cancelled=lambda index: index == 0 and heard.count(0) >= 4,
    )  # fmt: skip
    assert tokens(generations) == [free[0][:5], free[1]]


# ---- a local model as a Predictor ------------------------------------------------------------------------------------


def request(number: int, text: str, sampling: Sampling | None = None) -> Request:
    return Request(f"r{number}", (Message("user", text),), sampling)


@pytest.mark.parametrize("family", ["qwen2", "gemma", "gpt2"])
def test_replies_come_in_the_order_of_the_requests(tiny_model: Callable, family: str):
    local = LocalModel(tiny_model(family), room=Room(max_rows=2))
    chat = local.loaded.chat
    predictor = local.predictor("base", sampling=greedy(8))
    assert isinstance(predictor, Predictor)
    texts = ["Hi.", "A much longer request about a kettle, a bridge and a blue door.", "Kettle?", "Say it again, please.", "Ok"]
    requests = [request(number, text) for number, text in enumerate(texts)]
    progress: list[tuple[int, int]] = []
    replies = predictor.predict(requests, lambda done, total: progress.append((done, total)))
    assert progress == [(done, 5) for done in range(1, 6)]
    for asked, reply in zip(requests, replies, strict=True):
        prompt = chat.encode_prompt(asked.messages)
        alone = decode(local.loaded.model, [prompt], [greedy(8)], chat.end_token_ids)[0]
        assert reply.text == chat.decode(alone.tokens)
        assert reply.num_prompt_tokens == len(prompt)
        assert reply.num_completion_tokens == len(alone.tokens)
        assert reply.finish_reason == alone.finish_reason
        assert reply.cost_usd == 0


def test_a_request_brings_its_own_sampling(tiny_model: Callable):
    predictor = LocalModel(tiny_model("qwen2")).predictor("base", sampling=greedy(8))
    replies = predictor.predict([request(1, "Hi."), request(2, "Hi.", greedy(3))])
    assert [reply.num_completion_tokens for reply in replies] == [8, 3]


def test_a_request_that_fills_the_context_is_refused_and_a_long_answer_is_cut_to_fit(tiny_model: Callable):
    local = LocalModel(tiny_model("qwen2"))
    context = local.loaded.max_seq_length
    predictor = local.predictor("base", sampling=greedy(10_000))
    text = "kettle " * 200
    while local.loaded.chat.count_tokens((Message("user", text),)) > context - 3:
        text = text[:-4]
    reply = predictor.predict([request(1, text)])[0]
    assert 0 < reply.num_prompt_tokens + reply.num_completion_tokens <= context
    with pytest.raises(DataError, match=r"'r2' has \d+ tokens and the context holds 512"):
        predictor.predict([request(2, text + text)])
