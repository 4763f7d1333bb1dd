"""Reads preferences from JSON lines: pairs of answers in the spellings in use, and single answers with a label.

    {"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}     OpenAI (or ..._completion)
    {"prompt": ..., "chosen": ..., "rejected": ...}     TRL: texts or messages; `margin` (a number) may say by how much
    {"chosen": [...], "rejected": [...]}                two conversations that differ in their last turn (or Human:/Assistant: texts)
    {"prompt": ..., "completion": ..., "label": true}   one answer, wanted or not

One decision a reader may question: a single bad row stops the reading. Which answer was preferred cannot be repaired by guessing,
and rows that are left out in silence would shift what is learnt; so all bad rows are named at once, to be mended or deleted.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from giong.contracts import Message, Preference, Rating, Side
from giong.errors import DataError
from giong.workspace import content_hash

Item = TypeVar("Item", Preference, Rating, str)

NAMED_ROWS = 5
"""Bad rows that a message names one by one."""
PAIR_KEYS = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"), ("preferred_completion", "non_preferred_completion"))
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant"}
SPOKEN = re.compile(r"\n\n(Human|Assistant):")


class _BadRow(Exception):
    """Why a row cannot be used, in words that follow "line N: "."""


def read_preferences(path: Path) -> list[Preference]:
    """All pairs of a file, in its order. Raises DataError that names every bad line (the first few with their reasons)."""
    return _read(path, lambda row, name: [_pair(row, name)])


def read_ratings(path: Path) -> list[Rating]:
    """All single answers of a file; a pair counts as a wanted and an unwanted one. Raises DataError as `read_preferences`
    does, and where all have one label."""

    def ratings(row: Mapping[str, Any], name: str) -> list[Rating]:
        if "label" in row:
            return [_rating(row, name)]
        pair = _pair(row, name)
        return [
            Rating(f"{name} {side}", pair.messages, answer, side == "chosen")
            for side, answer in (("chosen", pair.chosen), ("rejected", pair.rejected))
        ]

    found = _read(path, ratings)
    if len({rating.label for rating in found}) == 1:
        raise DataError(
            f"Every answer has the label {str(found[0].label).lower()}",
            place=str(path),
            remedy="Answers of both kinds are needed: add the other.",
        )
    return found


def has_pairs(path: Path) -> bool:
    """Whether a preference file holds pairs, and not single answers with a label; told by its first row. False where it cannot be read."""
    try:
        with path.open(encoding="utf-8-sig") as stream:
            return "label" not in json.loads(next(line for line in stream if line.strip()))
    except (OSError, ValueError, StopIteration, TypeError):
        return False


def asked_requests(path: Path) -> set[str]:
    """Hashes (`content_hash`) of all requests of a preference file. Raises DataError as `read_preferences` does."""
    return set(_read(path, lambda row, name: [content_hash((_rating if "label" in row else _pair)(row, name).messages)]))


def hold_out(items: Sequence[Item], share: float, seed: int) -> dict[Side, list[Item]]:
    """Sides train and calibration, by request: what is asked on one side is not asked on the other. Raises DataError for one request."""
    requests = list(dict.fromkeys(content_hash(item.messages) for item in items))
    order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(requests))
    if len(requests) < 2:
        raise DataError(
            "All preferences are on one request: none can be held out", place="data.preferences", remedy="Collect more of them."
        )
    held = {requests[index] for index in order[: min(len(requests) - 1, max(1, round(share * len(requests))))]}
    return {
        "train": [item for item in items if content_hash(item.messages) not in held],
        "calibration": [item for item in items if content_hash(item.messages) in held],
    }


def _read(path: Path, parse: Callable[[Mapping[str, Any], str], list[Item]]) -> list[Item]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(
            "There is no preference file at this path", place=str(path), remedy="Correct data.preferences in giong.yaml."
        ) from None
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(
            f"The preference file cannot be read: {error}", place=str(path), remedy="It must be UTF-8 text, a JSON object a line."
        ) from None
    items: list[Item] = []
    bad: list[tuple[int, str]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise _BadRow("not a JSON object")
            items += parse(row, str(row.get("id") or f"line {number}"))
        except json.JSONDecodeError as error:
            bad.append((number, f"not valid JSON ({error.msg})"))
        except _BadRow as error:
            bad.append((number, str(error)))
    if bad:
        told = "; ".join(f"line {number}: {reason}" for number, reason in bad[:NAMED_ROWS])
        more = f"; and lines {', '.join(str(number) for number, _ in bad[NAMED_ROWS:])}" if len(bad) > NAMED_ROWS else ""
        raise DataError(
            f"{len(bad)} preference row{'s' if len(bad) > 1 else ''} cannot be used: {told}{more}", place=f"{path}:{bad[0][0]}",
            remedy="Mend or delete these lines.",
        )  # fmt: skip
    if not items:
        raise DataError("The preference file is empty", place=str(path), remedy="One JSON object a line: prompt, chosen, rejected.")
    return items


def _pair(row: Mapping[str, Any], name: str) -> Preference:
    keys = next((keys for keys in PAIR_KEYS if any(key in row for key in keys)), None)
    if keys is None:
        if "label" in row:
            raise _BadRow("one answer with a label is no pair: objective.name kto learns from such rows")
        raise _BadRow(f"no pair of answers: it has {', '.join(row) or 'no keys'} and needs {', '.join(PAIR_KEYS[0])}")
    for key in keys:
        if row.get(key) in (None, "", []):
            raise _BadRow(f"`{key}` is {'empty' if key in row else 'missing'}")
    chosen, rejected = (_turns(row[key], key, "assistant") for key in keys)
    if (request := row["input"] if "input" in row else row.get("prompt")) is not None:
        messages = _request(request)
    else:
        shared = next((n for n, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)) - 1)
        messages, chosen, rejected = tuple(chosen[:shared]), chosen[shared:], rejected[shared:]
        if not messages:
            raise _BadRow("no request: `prompt` is missing, and the answers are no conversations that begin alike")
    answers = [_answer(turns, key) for turns, key in zip((chosen, rejected), keys)]
    if answers[0].strip() == answers[1].strip():
        raise _BadRow("the two answers are equal")
    return Preference(name, _checked(messages), answers[0], answers[1], _margin(row.get("margin", 0.0)))


def _rating(row: Mapping[str, Any], name: str) -> Rating:
    if not any(row["label"] is value for value in (True, False, 0, 1)):
        raise _BadRow(f"label {row['label']!r} is neither true nor false")
    for key in ("prompt", "completion"):
        if row.get(key) in (None, "", []):
            raise _BadRow(f"`{key}` is {'empty' if key in row else 'missing'}")
    answer = _answer(_turns(row["completion"], "completion", "assistant"), "completion")
    return Rating(name, _checked(_request(row["prompt"])), answer, bool(row["label"]))


def _margin(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise _BadRow(f"margin {value!r} is no number of at least 0")
    return float(value)


def _request(value: Any) -> tuple[Message, ...]:
    if isinstance(value, dict):
        if value.get("tools"):
            raise _BadRow("`input` has tools, which cannot be trained with here")
        value = value.get("messages")
    return tuple(_turns(value, "prompt", "user"))


def _checked(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if not messages or messages[-1].role != "user":
        raise _BadRow(f"the request ends with the {messages[-1].role}'s turn" if messages else "the request is empty")
    return messages


def _answer(turns: Sequence[Message], key: str) -> str:
    if len(turns) != 1 or turns[0].role != "assistant":
        raise _BadRow(f"`{key}` must be one turn of the assistant, and has {', '.join(turn.role for turn in turns) or 'none'}")
    if not turns[0].content.strip():
        raise _BadRow(f"`{key}` is empty")
    return turns[0].content


def _turns(value: Any, key: str, role: str) -> list[Message]:
    """Messages of a text, a message or a list of messages; a text is one turn of `role`, unless it says who speaks."""
    if isinstance(value, str):
        if spoken := _spoken(value):
            return spoken
        if not value.strip():
            raise _BadRow(f"`{key}` is empty")
        return [Message(role, value)]  # type: ignore[arg-type]
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not turns:
        raise _BadRow(f"`{key}` is no text and no list of messages")
    return [_message(turn, key) for turn in turns]


def _spoken(text: str) -> list[Message]:
    parts = SPOKEN.split(text if text.startswith("\n\n") else "\n\n" + text)
    if parts[0].strip() or len(parts) < 3:
        return []
    turns = [Message(ROLES[speaker.lower()], said.strip()) for speaker, said in zip(parts[1::2], parts[2::2])]  # type: ignore[arg-type]
    # A prompt in this form ends where the assistant begins to speak.
    return turns[:-1] if turns[-1].role == "assistant" and not turns[-1].content else turns


def _message(turn: Any, key: str) -> Message:
    if not isinstance(turn, dict) or ROLES.get(turn.get("role")) is None:
        given = turn.get("role") if isinstance(turn, dict) else type(turn).__name__
        raise _BadRow(f"`{key}` has a message with the role {given!r}; known are {', '.join(ROLES)}")
    content = turn.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise _BadRow(f"`{key}` has a message whose content is no text")
    return Message(ROLES[turn["role"]], content)  # type: ignore[arg-type]
