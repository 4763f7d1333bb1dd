"""A language model as a judge of pairs of answers: which of two reads as if the author of these samples had written it?

Judges prefer what stands first, what is long and what they would have written, so every pair is asked in both orders (a judge who
contradicts himself has called a tie), win rates are also given at equal length, and nothing is shown of a judge who does not prefer
the author's own text to the same words shuffled. His verdicts are votes like those of people (`compare`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from giong.contracts import Example, Message, Predictor, Request, Sampling, request_text
from giong.data.words import count_words
from giong.errors import TeacherError
from giong.evaluation.compare.agreement import RaterPair, rater_pairs
from giong.evaluation.compare.results import rate
from giong.evaluation.compare.strength import Strength, strengths
from giong.evaluation.compare.votes import Choice, Vote
from giong.evaluation.controls import make_controls
from giong.evaluation.metrics.intervals import Interval

SELF_TEST_PAIRS = 10
SELF_TEST_RATE = 0.8
"""Share of the self-test that a judge must win, ties counting half."""
MAX_UNREADABLE = 0.2
NUM_RESAMPLES = 500
RIDGE = 0.05
SAMPLING = Sampling(max_new_tokens=400)

_SYSTEM = (
    "You compare two texts. Decide which of them reads as if it had been written by the author of the samples: word choice, rhythm, "
    "punctuation, turns of phrase. Length, correctness and politeness do not count. Write one sentence about the first text and one about "
    "the second, then a last line that says exactly VERDICT: 1, VERDICT: 2 or VERDICT: TIE."
)
_VERDICT = re.compile(r"^\W*verdict\W+(1|2|tie)\b", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class JudgedPair:
    """Two arms before the judge. Both rates are the first one's, a tie being half a win; `at_equal_length` is what a logistic
    regression on the difference of log lengths leaves of it.
    """

    arms: tuple[str, str]
    num_judged: int
    num_ties: int
    win_rate: Interval
    at_equal_length: Interval


@dataclass
class Judgement:
    """What a judge said. `pairs` and `strengths` are empty where the self-test was not passed; `sentences` say what is missing, and why.

    `first_rate` is how often the text that stood first was chosen, of all decided verdicts; 0.5 is fair.
    """

    judge: str
    self_test: Interval | None
    passed: bool
    num_asked: int = 0
    num_unreadable: int = 0
    num_contradictions: int = 0
    first_rate: float | None = None
    pairs: list[JudgedPair] = field(default_factory=list)
    strengths: list[Strength] = field(default_factory=list)
    votes: list[Vote] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Judge:
    """Asks a model, reads its verdicts, and counts what could not be read. `author_samples` are shown with every pair."""

    def __init__(self, predictor: Predictor, author_samples: Sequence[str]) -> None:
        self.predictor, self.samples = predictor, list(author_samples)
        self.num_asked, self.num_unreadable, self.num_contradictions = 0, 0, 0
        self._places: list[int] = []

    @property
    def first_rate(self) -> float | None:
        return self._places.count(1) / len(self._places) if self._places else None

    def votes(self, example: Example, texts: Mapping[str, str], pairs: Sequence[tuple[str, str]]) -> list[Vote]:
        """A vote per pair of arms whose two verdicts could be read; a contradiction is a tie. Raises TeacherError."""
        asked = [self._request(example, texts[one], texts[other]) for pair in pairs for one, other in (pair, pair[::-1])]
        replies = self.predictor.predict(asked)
        self.num_asked += len(replies)
        verdicts = [read_verdict(reply.text) for reply in replies]
        self.num_unreadable += verdicts.count(None)
        self._places += [int(verdict) for verdict in verdicts if verdict in ("1", "2")]
        found = []
        for pair, straight, swapped in zip(pairs, verdicts[::2], verdicts[1::2]):
            if straight is None or swapped is None:
                continue
            choice = {("1", "2"): "left", ("2", "1"): "right"}.get((straight, swapped), "tie")
            self.num_contradictions += straight == swapped != "tie"
            found.append(self._vote(example, pair, texts, choice))  # type: ignore[arg-type]
        return found

    def _request(self, example: Example, first: str, second: str) -> Request:
        samples = "\n\n".join(f"<sample>\n{text}\n</sample>" for text in self.samples)
        shown = f"<first>\n{first}\n</first>\n\n<second>\n{second}\n</second>"
        user = f"{samples}\n\nBoth texts answer this request:\n<request>\n{request_text(example.messages)}\n</request>\n\n{shown}"
        return Request(example.id, (Message("system", _SYSTEM), Message("user", user)), SAMPLING)

    def _vote(self, example: Example, pair: tuple[str, str], texts: Mapping[str, str], choice: Choice) -> Vote:
        left, right = pair
        return Vote(
            f"{example.id}:{left}:{right}", "preference", self.predictor.name, "", choice, left, right, example.id, example.document_id,
            example.messages, texts[left], texts[right], 0, "",
        )  # fmt: skip


def judge_arms(
    predictor: Predictor, author_samples: Sequence[str], examples: Sequence[Example], answers: Mapping[str, Sequence[str]],
    *, num_bootstrap: int = 2000, seed: int = 0,
) -> Judgement:  # fmt: skip
    """Test the judge, then have all pairs of arms judged on these examples; `answers[arm]` holds one text per example.

    What the judge said before its endpoint failed, or the money was spent, is kept and said to be a part.
    """
    judge = Judge(predictor, author_samples)
    settings = {"num_bootstrap": num_bootstrap, "seed": seed}
    sentences: list[str] = []
    own = [example.answer for example in examples[:SELF_TEST_PAIRS]]
    shuffled = make_controls(own, [""] * len(own), [], [], seed)["shuffled_words"]
    tests = [(example, {"author": one, "shuffled": other}) for example, one, other in zip(examples, own, shuffled)]
    control = _ask_all(judge, tests, [("author", "shuffled")], sentences)
    test = rate([_won(vote) for vote in control], control, settings) if control else None
    passed = test is not None and 2 * len(control) >= len(tests) and test.point >= SELF_TEST_RATE
    found = Judgement(predictor.name, test, passed, sentences=sentences)
    if passed:
        pairs = list(combinations(answers, 2))
        rows = [(example, {arm: answers[arm][place] for arm in answers}) for place, example in enumerate(examples)]
        judge.num_contradictions = 0
        found.votes = _ask_all(judge, rows, pairs, sentences)
        found.pairs = [pair for arms in pairs if (pair := _judged_pair(arms, found.votes, settings))]
        found.strengths = strengths(found.votes, list(answers), **settings)
    else:
        won = (
            "could not be read"
            if test is None or 2 * len(control) < len(tests)
            else f"preferred the author in {test.point:.0%} of the pairs"
        )
        sentences.append(
            f"The judge {predictor.name!r} did not pass its self-test (the author's text against its own words shuffled: {won}, needed are "
            f"{SELF_TEST_RATE:.0%}): nothing that it says is shown. Take another model in evaluation.judge.model."
        )  # fmt: skip
    found.num_asked, found.num_unreadable, found.first_rate = judge.num_asked, judge.num_unreadable, judge.first_rate
    found.num_contradictions = judge.num_contradictions
    if judge.num_unreadable > MAX_UNREADABLE * max(judge.num_asked, 1):
        sentences.append(
            f"{judge.num_unreadable} of {judge.num_asked} answers of the judge hold no line `VERDICT: 1`, `2` or `TIE`: these pairs are left out."
        )
    if found.votes and judge.num_contradictions > len(found.votes) / 2:
        sentences.append("The judge contradicted itself in most pairs when the order was swapped: it cannot tell these arms apart.")
    return found


def read_verdict(reply: str) -> str | None:
    """ "1", "2" or "tie" from the last line that gives one; None where none does."""
    found = _VERDICT.findall(reply)
    return found[-1].lower() if found else None


def agreement_with_people(votes: Sequence[Vote], people: Sequence[Vote]) -> RaterPair | None:
    """How the judge and the majority of people agree on the same two texts to the same request; None where nothing is in common."""
    chosen: dict[tuple[str, frozenset[tuple[str, str]]], list[str]] = {}
    for vote in people:
        if vote.mode == "preference":
            chosen.setdefault(_shown(vote), []).append(vote.winner or "tie")
    units = []
    for vote in votes:
        if said := chosen.get(_shown(vote)):
            most = max(said.count(choice) for choice in said)
            leading = {choice for choice in said if said.count(choice) == most}
            units.append({"people": leading.pop() if len(leading) == 1 else "tie", "judge": vote.winner or "tie"})
    return next(iter(rater_pairs(units)), None)


def rate_at_equal_length(
    values: np.ndarray, log_ratios: np.ndarray, documents: Sequence[str], *, num_bootstrap: int = NUM_RESAMPLES, seed: int = 0
) -> Interval:
    """The win rate that a logistic regression predicts for two texts of one length (the idea of Dubois et al. 2024, 2404.04475).

    `values` are 1, 0.5 or 0, `log_ratios` ln(words / words of the other); intervals over resampled documents.
    """
    names, index = np.unique(np.asarray(documents, dtype=object).astype(str), return_inverse=True)
    if len(names) < 2:
        names, index = np.arange(len(values)), np.arange(len(values))
    times_drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=num_bootstrap)
    design = np.stack([np.ones(len(values)), log_ratios], axis=1)
    rates = 1 / (1 + np.exp(-_logistic(design, values, np.concatenate([np.ones((1, len(values))), times_drawn[:, index]]))[:, 0]))
    low, high = np.quantile(rates[1:], [0.025, 0.975])
    return Interval(float(rates[0]), float(low), float(high))


def _logistic(design: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Coefficients (B, K) of B logistic regressions on the same rows with weights (B, N), less ridge/2 |coefficients|^2; Newton's method."""
    coefficients = np.zeros((len(weights), design.shape[1]))
    for _ in range(50):
        expected = 1 / (1 + np.exp(-coefficients @ design.T))
        gradient = (weights * (values - expected)) @ design - RIDGE * coefficients
        curvature = np.einsum("bn,nk,nl->bkl", weights * expected * (1 - expected), design, design) + RIDGE * np.eye(design.shape[1])
        step = np.clip(np.linalg.solve(curvature, gradient[..., None])[..., 0], -2, 2)
        coefficients = coefficients + step
        if np.abs(step).max() < 1e-9:
            break
    return coefficients


def _ask_all(
    judge: Judge, rows: Sequence[tuple[Example, Mapping[str, str]]], pairs: Sequence[tuple[str, str]], sentences: list[str]
) -> list[Vote]:  # fmt: skip
    """Votes request by request, so that what was said before a failure is whole for the requests that it covers."""
    votes: list[Vote] = []
    for done, (example, texts) in enumerate(rows):
        try:
            votes += judge.votes(example, texts, pairs)
        except TeacherError as error:
            sentences.append(f"The judge stopped after {done} of {len(rows)} requests: {error} What it said until then is kept.")
            break
    return votes


def _judged_pair(arms: tuple[str, str], votes: Sequence[Vote], settings: dict[str, int]) -> JudgedPair | None:
    between = [vote for vote in votes if set(vote.arms) == set(arms)]
    if not between:
        return None
    values = [_won(vote) for vote in between]
    lengths = [[max(count_words(text), 0.5) for text in (vote.left_text, vote.right_text)] for vote in between]
    ratios = np.array([np.log(left / right) for left, right in lengths])
    documents = [vote.document_id for vote in between]
    adjusted = rate_at_equal_length(np.array(values), ratios, documents, seed=settings["seed"])
    return JudgedPair(arms, len(between), sum(vote.choice == "tie" for vote in between), rate(values, between, settings), adjusted)


def _won(vote: Vote) -> float:
    return {"left": 1.0, "right": 0.0, "tie": 0.5}[vote.choice]


def _shown(vote: Vote) -> tuple[str, frozenset[tuple[str, str]]]:
    return vote.request_id, frozenset({(vote.left, vote.left_text), (vote.right, vote.right_text)})
