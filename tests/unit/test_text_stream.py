"""Streamed text: whole characters only, stop strings across token borders; in sum always the text of all tokens."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from giong.serving.text_stream import TextStream


def bytes_text(tokens: Sequence[int]) -> str:
    """A tokenizer whose tokens are single bytes: the hardest one to stream."""
    return bytes(tokens).decode(errors="replace")


def words_text(words: Sequence[int]) -> str:
    return "".join(VOCABULARY[word] for word in words)


VOCABULARY = ["one ", "two ", "th", "ree", " END", "EN", "D", "ding", "\n", "\n\nUser"]


def run(stream: TextStream, tokens: Sequence[int]) -> list[str]:
    parts = []
    for token in tokens:
        parts.append(stream.push(token))
        if stream.stopped:
            break
    return [*parts, stream.finish()]


@pytest.mark.parametrize("text", ["plain", "giọng điệu", "语气", "🙂👩‍🚀", "a\u0301e"])
def test_no_delta_holds_half_a_character(text: str) -> None:
    parts = run(TextStream(bytes_text), text.encode())
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts)
    assert parts[-1] == ""


def test_bytes_that_never_become_a_character_are_shown_once_that_is_certain() -> None:
    whole = b"a\xe2\x82b\xf0\x9f"
    parts = run(TextStream(bytes_text), whole)
    assert parts == ["a", "", "", "\ufffdb", "", "", "\ufffd"]
    assert "".join(parts) == whole.decode(errors="replace")


def test_a_stop_string_across_tokens_is_held_back_and_never_shown() -> None:
    stream = TextStream(words_text, ["END"])
    assert [stream.push(word) for word in (0, 5, 6)] == ["one ", "", ""]
    assert stream.stopped
    assert stream.finish() == ""
    assert stream.num_tokens == 3
    assert stream.push(1) == ""


def test_what_only_began_like_a_stop_string_is_shown_after_all() -> None:
    stream = TextStream(words_text, ["ENDED", "three four"])
    assert [stream.push(word) for word in (1, 2, 3, 0, 5, 6)] == ["two ", "", "", "threeone ", "", ""]
    assert not stream.stopped
    assert stream.finish() == "END"


def test_the_earliest_of_several_stop_strings_cuts() -> None:
    stream = TextStream(words_text, ["D", "END", "\n\n"])
    assert run(stream, [0, 4, 7]) == ["one ", " ", ""]
    assert stream.stopped
    stream = TextStream(words_text, ["\n\n"])
    assert run(stream, [1, 8, 9]) == ["two ", "", "", ""]
    assert stream.stopped


def test_a_stop_string_inside_one_token_cuts_that_token() -> None:
    stream = TextStream(words_text, ["wo"])
    assert stream.push(1) == "t"
    assert stream.stopped
