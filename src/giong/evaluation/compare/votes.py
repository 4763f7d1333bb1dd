"""Votes: one line of `votes.jsonl` each, appended and never changed. A second vote on the same pair replaces the first one."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from giong.contracts import Message
from giong.errors import ConfigError, DataError
from giong.evaluation.compare.pairs import MODES, Mode, Pair
from giong.workspace import Project, append_jsonl, mend_torn_end, read_jsonl

Choice = Literal["left", "right", "tie"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
MAX_NAME_CHARACTERS = 80


@dataclass(frozen=True, slots=True)
class Vote:
    """One judgement: who, when (ISO 8601, UTC), what was shown on which side, and what was chosen.

    `consent` is the text that the rater agreed to before the first pair.
    """

    pair: str
    mode: Mode
    rater: str
    time: str
    choice: Choice
    left: str
    right: str
    request_id: str
    document_id: str
    messages: tuple[Message, ...]
    left_text: str
    right_text: str
    seed: int
    consent: str

    @property
    def arms(self) -> tuple[str, str]:
        return self.left, self.right

    @property
    def winner(self) -> str | None:
        """The arm that was chosen; None for a tie."""
        return {"left": self.left, "right": self.right, "tie": None}[self.choice]

    @property
    def text_of(self) -> dict[str, str]:
        return {self.left: self.left_text, self.right: self.right_text}


def votes_path(project: Project) -> Path:
    return project.root / "votes.jsonl"


def cast(path: Path, pair: Pair, choice: str, *, rater: str, mode: Mode, seed: int, consent: str) -> Vote:
    """Append a vote on a pair as it was shown. Raises ConfigError for an unknown choice, and without a consent."""
    if choice not in CHOICES:
        raise ConfigError(f"{choice!r} is no choice", place="choice", remedy=f"Choose one of: {', '.join(CHOICES)}.")
    if not consent.strip():
        raise ConfigError("There is no consent of the rater", place="consent", remedy="Show the rater what votes are used for, and ask.")
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    vote = Vote(
        pair.id, mode, check_rater(rater), time, choice, *pair.arms, pair.request_id, pair.document_id, pair.messages, *pair.texts,
        seed, consent,
    )  # type: ignore[arg-type]  # fmt: skip
    append_jsonl(path, vote)
    return vote


def check_rater(name: str) -> str:
    """The rater's name without blanks around it. Raises ConfigError for none, or one that is a text."""
    name = " ".join(name.split())
    if not name or len(name) > MAX_NAME_CHARACTERS:
        raise ConfigError(
            f"{name[:MAX_NAME_CHARACTERS]!r} is no rater's name", place="rater", remedy=f"Give 1 to {MAX_NAME_CHARACTERS} characters."
        )
    return name


def read_votes(path: Path) -> list[Vote]:
    """All votes in the order of their casting; none where nobody has voted. Raises DataError naming the line that is no vote."""
    if not path.is_file():
        return []
    mend_torn_end(path)
    return [_vote(row, f"{path}:{number}") for number, row in enumerate(read_jsonl(path), start=1)]


def _vote(row: dict[str, Any], place: str) -> Vote:
    names = {field.name for field in fields(Vote)}
    wrong = sorted(names ^ set(row)) if isinstance(row, dict) else ["not an object"]
    if wrong or row["choice"] not in CHOICES or row["mode"] not in MODES:
        found = f"keys: {', '.join(wrong)}" if wrong else f"choice {row['choice']!r}, mode {row['mode']!r}"
        raise DataError(f"This line is not a vote ({found})", place=place, remedy="Mend or delete that line.")
    return Vote(**{**row, "messages": tuple(Message(**message) for message in row["messages"])})


def latest(votes: Iterable[Vote]) -> list[Vote]:
    """The last vote of every rater on every pair (a rater may go back and change it)."""
    return list({(vote.mode, vote.rater, vote.pair): vote for vote in votes}.values())
