"""A whole conversation as tokens with the loss weights of its turns: several answers, tool calls, per-message weights.

The way of `chat_template`, for every assistant's turn at once: the conversation is rendered with a probe in the place of each answer,
and what stands between the probes is the template's. A turn that calls tools is found by rendering it as two other answers: what all
three renderings begin and end with is not its own. docs/decisions/0004 has the reasons.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from giong.contracts import Message
from giong.errors import ModelError
from giong.models.chat_template import FIRST_PROBE, SECOND_PROBE, ChatFormat

REMEDY = "Set model.chat_template to a template that takes it, or leave the row out."


@dataclass(frozen=True, slots=True)
class _Turn:
    """An assistant's turn: where it lies in the rendering with probes, and what is learned there."""

    start: int
    end: int
    message: Message


def encode_conversation(
    chat: ChatFormat, messages: Sequence[Message], *, tools: Sequence[dict[str, Any]] = (), loss_on: str = "answers"
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids up to the end-of-turn token of the last answer, and a loss weight for each.

    `loss_on` is "answers" (every assistant's turn and its end-of-turn token, by the turn's weight), "last_answer", or "all" (what is
    not the assistant's counts 1). Turns keep every character, as in `ChatFormat.encode`. Where the template ends turns in the middle with
    text alone, their loss ends with the answer. Raises ModelError for a template that refuses the conversation or drops a part of it.
    """
    text, turns = _rendered(chat, messages, tools)
    edges = [0, *(turn.end for turn in turns)]
    between = [text[start : turn.start].removesuffix(_gap(chat, turn)) for start, turn in zip(edges, turns)] + [text[edges[-1] :]]
    closing_ids = chat.tokens(chat.render([Message("user", "Hello")])[1])
    end_token = chat.end_token_ids[0]
    ending = closing_ids[: closing_ids.index(end_token) + 1] if end_token in closing_ids else []
    rest_weight = 1.0 if loss_on == "all" else 0.0
    ids, so_far = chat.tokens(between[0]), between[0]
    weights = [rest_weight] * len(ids)
    for number, turn in enumerate(turns):
        is_last = number == len(turns) - 1
        own = _gap(chat, turn) + turn.message.content if not turn.message.tool_calls else text[turn.start : turn.end]
        answer_ids, following_ids = _answer_and_following(chat, ids, so_far, own, between[number + 1], literal=not turn.message.tool_calls)
        ends = following_ids[: len(ending)] == ending and bool(ending)
        end_ids = ending if ends else [end_token] if is_last else []
        rest_ids = [] if is_last else following_ids[len(end_ids) :]
        weight = turn.message.weight if is_last or loss_on != "last_answer" else 0.0
        ids = [*ids, *answer_ids, *end_ids, *rest_ids]
        weights += [weight] * (len(answer_ids) + len(end_ids)) + [rest_weight] * len(rest_ids)
        so_far += own + between[number + 1]
    weights[0] = 0.0
    return np.asarray(ids, dtype=np.int64), np.asarray(weights, dtype=np.float32)


def _gap(chat: ChatFormat, turn: _Turn) -> str:
    return "" if turn.message.tool_calls else chat.gap


def _rendered(chat: ChatFormat, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> tuple[str, list[_Turn]]:
    """The conversation with a probe for each plain answer, and where the assistant's turns lie in it."""
    probes = {index: f"{FIRST_PROBE[:2]}{index}{FIRST_PROBE[2:]}" for index, message in enumerate(messages) if _is_plain(message)}
    probed = [replace(message, content=probes[index]) if index in probes else message for index, message in enumerate(messages)]
    text = chat.render_conversation(probed, tools)
    _check_nothing_is_dropped(chat, messages, tools, text)
    turns, position = [], 0
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        start = text.find(probes[index], position) if index in probes else -1
        end = start + len(probes.get(index, ""))
        if index not in probes:
            others = [
                chat.render_conversation([*probed[:index], Message("assistant", probe), *probed[index + 1 :]], tools)
                for probe in (FIRST_PROBE, SECOND_PROBE)
            ]  # fmt: skip
            start = len(os.path.commonprefix([text, *others]))
            end = len(text) - len(os.path.commonprefix([each[::-1] for each in (text[start:], *others)]))
        if start < position or end <= start:
            raise ModelError(f"The chat template leaves the assistant's turn {index + 1} out", remedy=REMEDY)
        turns.append(_Turn(start, end, message))
        position = end
    return text, turns


def _is_plain(message: Message) -> bool:
    return message.role == "assistant" and not message.tool_calls


def _check_nothing_is_dropped(chat: ChatFormat, messages: Sequence[Message], tools: Sequence[dict[str, Any]], text: str) -> None:
    """Most templates that know no tools leave them out without a word."""
    for tool in tools:
        if tool["function"]["name"] not in text:
            raise ModelError(f"The chat template leaves the tool {tool['function']['name']!r} out", remedy=REMEDY)
    for message in messages:
        for call in message.tool_calls:
            if call["function"]["name"] not in text:
                raise ModelError(f"The chat template leaves the call of {call['function']['name']!r} out", remedy=REMEDY)
        if message.role == "tool" and message.content.strip() not in text:
            raise ModelError("The chat template leaves a tool's answer out", remedy=REMEDY)


def _answer_and_following(
    chat: ChatFormat, ids: list[int], so_far: str, own: str, following: str, *, literal: bool
) -> tuple[list[int], list[int]]:  # fmt: skip
    """Tokens of an answer and of the template's text behind it, as they are behind `ids`; `literal`: special tokens spelt out stay text."""
    following_ids = chat.tokens(following)
    if literal and any(spelling in own for spelling in chat.special_spellings):
        return chat.tokens(own, as_text=True), following_ids
    whole = chat.tokens(so_far + own + following)
    answer_ids = whole[len(ids) :] if whole[: len(ids)] == ids else chat.tokens(own + following)
    if not following_ids or answer_ids[-len(following_ids) :] == following_ids:
        return answer_ids[: len(answer_ids) - len(following_ids)], following_ids
    # The tokenizer merges across the border, where the model has to stop: it is kept.
    return chat.tokens(own), following_ids
