"""What the votes come to: win rates, strengths of more than two arms, agreement of the raters, detection of the author.

Only votes on the answers of today count; those on answers that were replaced since are counted and named. Intervals resample
documents, because votes on one document's requests are not independent, and are never narrower than Wilson's over the requests:
where all votes agree, a bootstrap alone would claim to be certain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from giong.config import load
from giong.errors import StoryError
from giong.evaluation.answers import answered, texts_of
from giong.evaluation.compare.agreement import RaterPair, krippendorff_alpha, rater_pairs
from giong.evaluation.compare.strength import Strength, strengths
from giong.evaluation.compare.votes import Vote, latest, read_votes, votes_path
from giong.evaluation.metrics.intervals import Interval, bootstrap, wilson
from giong.evaluation.results import AUTHOR, finite
from giong.workspace import Project

CHANCE = 0.5


@dataclass(frozen=True, slots=True)
class ArmPair:
    """Two arms against each other. `win_rate` is the first one's, a tie being half a win."""

    arms: tuple[str, str]
    num_votes: int
    num_wins: int
    num_losses: int
    num_ties: int
    win_rate: Interval


@dataclass(frozen=True, slots=True)
class Detection:
    """How often the author's text was recognised beside an arm's, "cannot tell" being half right; chance is 0.5."""

    arm: str
    num_votes: int
    num_right: int
    num_wrong: int
    num_unsure: int
    rate: Interval

    @property
    def above_chance(self) -> bool:
        return self.rate.low > CHANCE


@dataclass
class Results:
    """Everything about the votes of a project. `alpha` is Krippendorff's, None where no two raters judged the same pair.

    `left_rate` is the share of left among decided votes: far from a half, raters choose by position. `strengths` is empty for two arms,
    and where some arms were never linked by comparisons.
    """

    num_votes: int
    num_outdated: int
    num_replaced: int
    raters: dict[str, int]
    labels: dict[str, str]
    pairs: list[ArmPair] = field(default_factory=list)
    strengths: list[Strength] = field(default_factory=list)
    detections: list[Detection] = field(default_factory=list)
    alpha: float | None = None
    num_judged_twice: int = 0
    rater_pairs: list[RaterPair] = field(default_factory=list)
    left_rate: Interval | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values; numbers that do not exist are None, never NaN."""
        return finite(asdict(self))


def vote_results(project: Project) -> Results:
    """Read and sum up the votes of a project. Raises StoryError where nobody has voted."""
    cast = read_votes(votes_path(project))
    if not cast:
        raise StoryError("Nobody has voted yet", place=str(votes_path(project)), remedy="Run `giong compare` first.")
    config = load(project.config_path)
    test, labels = answered(project, config)
    today = {(arm, example.id): text for arm in labels for example, text in zip(test, texts_of(project, arm, test))}
    settings = {"num_bootstrap": config.evaluation.num_bootstrap, "seed": config.evaluation.seed}
    return sum_up(
        cast, labels, lambda vote: all(today.get((arm, vote.request_id)) == text for arm, text in vote.text_of.items()), **settings
    )


def sum_up(
    cast: Sequence[Vote], labels: dict[str, str], is_current: Callable[[Vote], bool] = lambda vote: True,
    *, num_bootstrap: int = 2000, seed: int = 0,
) -> Results:  # fmt: skip
    """The figures of these votes; the last vote of a rater on a pair counts. `labels` name the arms, in their order."""
    last = latest(cast)
    votes = [vote for vote in last if is_current(vote)]
    order = [*labels, *dict.fromkeys(arm for vote in votes for arm in vote.arms if arm not in labels)]
    settings = {"num_bootstrap": num_bootstrap, "seed": seed}
    preferences = [vote for vote in votes if vote.mode == "preference"]
    guesses = [vote for vote in votes if vote.mode == "author"]
    winners: dict[tuple[str, str], dict[str, str]] = {}
    for vote in votes:
        winners.setdefault((vote.mode, vote.pair), {})[vote.rater] = vote.winner or "tie"
    decided = [vote for vote in votes if vote.choice != "tie"]
    return Results(
        len(votes), len(last) - len(votes), len(cast) - len(last), dict(Counter(vote.rater for vote in votes)), labels,
        pairs=[pair for arms in combinations(order, 2) if (pair := _arm_pair(preferences, arms, settings))],
        strengths=strengths(preferences, order, **settings),
        detections=[found for arm in (None, *order) if (found := _detection(guesses, arm, settings))],
        alpha=krippendorff_alpha([list(unit.values()) for unit in winners.values()]),
        num_judged_twice=sum(len(unit) > 1 for unit in winners.values()),
        rater_pairs=rater_pairs(list(winners.values())),
        left_rate=rate([float(vote.choice == "left") for vote in decided], decided, settings) if decided else None,
    )  # fmt: skip


def rate(values: Sequence[float], votes: Sequence[Vote], settings: dict[str, int]) -> Interval:
    """Mean of values in 0 to 1, one per vote, between the wider ends of the bootstrap over documents and of Wilson's over requests."""
    resampled = bootstrap(np.array(values), [vote.document_id for vote in votes], **settings)
    num_requests = len({vote.request_id for vote in votes})
    score = wilson(resampled.point * num_requests, num_requests)
    return Interval(resampled.point, min(resampled.low, score.low), max(resampled.high, score.high), score.level)


def _arm_pair(votes: Sequence[Vote], arms: tuple[str, str], settings: dict[str, int]) -> ArmPair | None:
    between = [vote for vote in votes if set(vote.arms) == set(arms)]
    if not between:
        return None
    wins, losses = (sum(vote.winner == arm for vote in between) for arm in arms)
    values = [0.5 if vote.winner is None else float(vote.winner == arms[0]) for vote in between]
    return ArmPair(arms, len(between), wins, losses, len(between) - wins - losses, rate(values, between, settings))


def _detection(guesses: Sequence[Vote], arm: str | None, settings: dict[str, int]) -> Detection | None:
    """Against one arm, or (None) all of them; the sum only where there are several."""
    others = {other for vote in guesses for other in vote.arms if other != AUTHOR}
    beside = [vote for vote in guesses if arm is None or arm in vote.arms]
    if not beside or arm == AUTHOR or (arm is None and len(others) < 2):
        return None
    right, unsure = (sum(vote.winner == winner for vote in beside) for winner in (AUTHOR, None))
    values = [0.5 if vote.winner is None else float(vote.winner == AUTHOR) for vote in beside]
    return Detection(arm or "all", len(beside), right, len(beside) - right - unsure, unsure, rate(values, beside, settings))
