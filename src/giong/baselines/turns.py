"""Putting an instruction or shown examples into a request: the one place where prompts are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from giong.contracts import Example, Message, Request

CountTokens = Callable[[Sequence[Message]], int]
"""Tokens of a conversation, with the model's chat template and the opening of its answer."""


def shown(examples: Sequence[Example]) -> tuple[Message, ...]:
    """Examples as turns that went before: the request without its system message, then the author's answer."""
    return tuple(turn for example in examples for turn in example.conversation if turn.role != "system")


def with_turns(request: Request, turns: Sequence[Message] = (), instruction: str = "") -> Request:
    """The request with earlier turns before it and an instruction in (or added to) its system message."""
    system = [turn.content for turn in request.messages if turn.role == "system"]
    if instruction:
        system.append(instruction)
    opening = (Message("system", "\n\n".join(system)),) if system else ()
    rest = tuple(turn for turn in request.messages if turn.role != "system")
    return dataclasses.replace(request, messages=(*opening, *turns, *rest))


def fits(messages: Sequence[Message], count_tokens: CountTokens | None, max_prompt_tokens: int | None) -> bool:
    """Whether a conversation is within the limit; always so where no counter or limit is known."""
    return count_tokens is None or max_prompt_tokens is None or count_tokens(messages) <= max_prompt_tokens


def different_answers(examples: Sequence[Example]) -> list[Example]:
    """The first example of every answer: one passage may have requests of several kinds."""
    return list({example.answer: example for example in reversed(examples)}.values())[::-1]
