"""A comparison under way: which pairs there are, which a rater has still to judge, and the votes.

It holds what it read at its start; votes are read anew each time, so that a terminal and a page may be open at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from giong.config import load
from giong.errors import ConfigError, StoryError
from giong.evaluation.answers import answered, texts_of
from giong.evaluation.compare import votes as ballots
from giong.evaluation.compare.export import Exported, export_preferences
from giong.evaluation.compare.pairs import MODES, Mode, Pair, in_order, make_pairs
from giong.evaluation.compare.results import Results, vote_results
from giong.evaluation.compare.votes import Vote, read_votes
from giong.evaluation.report.table import ARM_LABELS
from giong.evaluation.results import AUTHOR, TUNED
from giong.workspace import Project, read_json


class Comparison:
    """Pairs of answers of a project, for any number of raters.

    `arms` are names as in the evaluation, "author" among them; by default the tuned model, the best prompt and the author. `seed`
    decides order and sides; `num_pairs` is the most that one rater is shown. Raises StoryError where an arm has not answered the
    test requests of today, ConfigError for an unknown arm or mode.
    """

    def __init__(
        self, project: Project, arms: Sequence[str] | None = None, *, mode: Mode = "preference", seed: int | None = None,
        num_pairs: int | None = None,
    ) -> None:  # fmt: skip
        if mode not in MODES:
            raise ConfigError(f"There is no mode {mode!r}", place="mode", remedy=f"Modes: {', '.join(MODES)}.")
        self.project, self.mode, self.num_pairs = project, mode, num_pairs
        self._votes = ballots.votes_path(project)
        config = load(project.config_path)
        self.seed = config.evaluation.seed if seed is None else seed
        self.author = config.data.consent.author
        test, self.labels = answered(project, config)
        chosen = list(dict.fromkeys(arms)) if arms else default_arms(project, self.labels)
        if mode == "author" and AUTHOR not in chosen:
            chosen.append(AUTHOR)
        _check(chosen, self.labels, project)
        self.arms = chosen
        answers = {arm: texts_of(project, arm, test) for arm in chosen}
        self.pairs, self.num_equal = make_pairs(test, answers, mode)
        if not self.pairs:
            raise StoryError(
                "All answers of these arms are the same", place=", ".join(chosen), remedy="Compare others, or train a model that differs."
            )

    def all_for(self, rater: str) -> list[Pair]:
        """Every pair that this rater is to judge, in order and with sides as shown."""
        return in_order(self.pairs, ballots.check_rater(rater), self.mode, self.seed)[: self.num_pairs]

    def remaining(self, rater: str) -> list[Pair]:
        """Those that the rater has not judged yet."""
        rater = ballots.check_rater(rater)
        judged = {vote.pair for vote in read_votes(self._votes) if (vote.rater, vote.mode) == (rater, self.mode)}
        return [pair for pair in self.all_for(rater) if pair.id not in judged]

    def vote(self, pair: Pair, choice: str, *, rater: str, consent: str) -> Vote:
        """Record "left", "right" or "tie" on a pair of `remaining`; `consent` is the text that the rater agreed to."""
        return ballots.cast(self._votes, pair, choice, rater=rater, mode=self.mode, seed=self.seed, consent=consent)

    def results(self) -> Results:
        """What all votes of the project come to."""
        return vote_results(self.project)

    def export(self, path: str | Path, *, with_raters: bool = False) -> Exported:
        """Write all votes of the project as preference pairs."""
        return export_preferences(self.project, path, with_raters=with_raters)


def default_arms(project: Project, labels: dict[str, str]) -> list[str]:
    """The tuned model, the best prompt (else the last one) and the author, as far as they have answered."""
    path = project.root / "evaluation.json"
    best = read_json(path)["evaluation"]["best_prompt_arm"] if path.is_file() else None
    prompts = [name for name in labels if name.partition("@")[0] in ARM_LABELS and name not in (TUNED, AUTHOR)]
    prompt = best if best in prompts else prompts[-1] if prompts else None
    return [arm for arm in (TUNED, prompt, AUTHOR) if arm in labels]


def _check(arms: Sequence[str], labels: dict[str, str], project: Project) -> None:
    unknown = [arm for arm in arms if arm not in labels]
    if unknown and not any(project.arm_path(arm).is_file() for arm in unknown):
        raise ConfigError(f"There are no answers of an arm {unknown[0]!r}", place="arms", remedy=f"There are: {', '.join(labels)}.")
    if unknown:
        raise StoryError(
            f"The answers of {unknown[0]!r} belong to other test requests", place=str(project.arm_path(unknown[0])),
            remedy="Run `giong baseline` and `giong eval` again (with --force where nothing changed).",
        )  # fmt: skip
    if len(arms) < 2:
        raise StoryError(
            f"There is nothing to compare with {ARM_LABELS.get(arms[0], arms[0]) if arms else 'no arm'}", place=str(project.root),
            remedy="Run `giong baseline` first, or name two arms.",
        )  # fmt: skip
