"""Votes as preference pairs, in TRL's conversational form: one JSON object a line with `prompt`, `chosen` and `rejected`.

One line per pair of answers, by the majority of its raters: a pair that raters are divided on would otherwise be trained in both
directions at once. Votes on answers that have been replaced since count too, for they say what they said about those texts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from giong.contracts import Message
from giong.errors import StoryError
from giong.evaluation.compare.votes import Vote, latest, read_votes, votes_path
from giong.workspace import Project, write_jsonl


@dataclass(frozen=True, slots=True)
class Exported:
    """How many pairs were written, and how many were left out: ties, raters divided, an empty answer; and votes of mode `author`."""

    path: Path
    num_pairs: int
    num_ties: int
    num_divided: int
    num_empty: int
    num_author_votes: int


def export_preferences(project: Project, path: str | Path, *, with_raters: bool = False) -> Exported:
    """Write the pairs to `path` (atomically, in the place of what was there). `with_raters` adds who voted, when and how.

    Raises StoryError where there are no votes.
    """
    path = Path(path).expanduser().resolve()
    votes = latest(read_votes(votes_path(project)))
    if not votes:
        raise StoryError("Nobody has voted yet", place=str(votes_path(project)), remedy="Run `giong compare` first.")
    by_pair: dict[str, list[Vote]] = {}
    for vote in votes:
        if vote.mode == "preference":
            by_pair.setdefault(vote.pair, []).append(vote)
    rows, left_out = [], Counter()
    for group in by_pair.values():
        winner = _majority(group)
        texts = group[0].text_of
        if winner is None:
            left_out["divided" if any(vote.winner for vote in group) else "ties"] += 1
        elif not all(text.strip() for text in texts.values()):
            left_out["empty"] += 1
        else:
            rows.append(_row(group, winner, with_raters))
    write_jsonl(path, rows)
    num_author = sum(vote.mode == "author" for vote in votes)
    return Exported(path, len(rows), left_out["ties"], left_out["divided"], left_out["empty"], num_author)


def _majority(votes: list[Vote]) -> str | None:
    """The arm with more votes than the other; ties count for neither."""
    counts = Counter(vote.winner for vote in votes)
    left, right = (counts[arm] for arm in votes[0].arms)
    return None if left == right else votes[0].arms[left < right]


def _row(votes: list[Vote], winner: str, with_raters: bool) -> dict[str, Any]:
    texts = votes[0].text_of
    loser = next(arm for arm in votes[0].arms if arm != winner)
    row: dict[str, Any] = {
        "prompt": [message.to_dict() for message in votes[0].messages],
        "chosen": [Message("assistant", texts[winner]).to_dict()],
        "rejected": [Message("assistant", texts[loser]).to_dict()],
    }
    if with_raters:
        said = {winner: "chosen", loser: "rejected", None: "tie"}
        row["votes"] = [{"rater": vote.rater, "time": vote.time, "choice": said[vote.winner]} for vote in votes]
    return row
