"""The trials of one search: what was tried is a journal on disk, what to try next follows from it.

Optuna chooses and prunes, but its study is thrown away after every choice and made again from the journal, with a sampler
seeded by the number of the trial. So a killed search chooses the same again, whatever the clock said, and needs neither
Optuna's storage (whose lock file outlives a kill) nor a pickled sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from giong.config import Parameter
from giong.errors import ConfigError, StoryError
from giong.evaluation.metrics.selection import BestOf, best_of
from giong.evaluation.results import finite
from giong.workspace import append_jsonl, mend_torn_end, read_json, read_jsonl, write_json

if TYPE_CHECKING:
    import optuna

NUM_STARTUP_TRIALS = 5
"""Trials drawn at random before the sampler learns from them."""
NUM_UNPRUNED_TRIALS = 4
"""Trials that have to finish before others are stopped: the median of fewer says little."""
MAX_DRAWS = 50
"""Draws that repeat earlier settings before the space counts as exhausted."""
FEW_DOCUMENTS = 8
"""Below this a bootstrap over documents has too little to draw from."""
SIGNIFICANT_DIGITS = 3
"""Of chosen numbers: what goes into giong.yaml should be readable, and no result hangs on a fourth digit."""


class TrialPruned(Exception):
    """Control flow, never shown: raised inside a trial's own event stream to end it at `percent` of its way."""

    def __init__(self, percent: int, value: float) -> None:
        # Its own arguments and no sentence: other processes are told of it too, and unpickling calls the class with them.
        super().__init__(percent, value)
        self.percent, self.value = percent, value

    def __str__(self) -> str:
        return f"stopped at {self.percent} %"


Watch = Callable[[int, float], None]
"""Told (percent, loss per unit of weight) on a trial's way; raises TrialPruned to end it."""


@dataclass(frozen=True)
class Measured:
    """What a trial gives to the journal; without losses where it did not come to its end."""

    run: str
    losses: list[float]
    weights: list[float]
    reports: dict[int, float]


@dataclass(frozen=True)
class Trial:
    """One line of the journal.

    `losses` and `weights` are per validation item (nats and tokens of an answer), empty unless finished; `reports` maps the
    percent of the way to the loss per unit of weight there.
    """

    number: int
    settings: dict[str, Any]
    state: Literal["finished", "pruned", "failed"]
    run: str
    seconds: float
    losses: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    reports: dict[int, float] = field(default_factory=dict)

    @property
    def value(self) -> float | None:
        return sum(self.losses) / sum(self.weights) if self.losses else None


class Search:
    """Trials over `parameters` in a folder of their own. Trial 0 is the settings as they were when the search began."""

    def __init__(self, folder: Path, parameters: Mapping[str, Parameter], seed: int, present: Mapping[str, Any]) -> None:
        self.folder, self.parameters, self.seed = folder, dict(parameters), seed
        if not (folder / "search.json").is_file():
            write_json(folder / "search.json", {"parameters": self.parameters, "seed": seed, "present": dict(present)})
        # Frozen: the settings in giong.yaml may since be those of an earlier winner.
        self.present: dict[str, Any] = read_json(folder / "search.json")["present"]
        self.journal = folder / "trials.jsonl"
        mend_torn_end(self.journal)
        rows = read_jsonl(self.journal) if self.journal.is_file() else []
        self.trials = [Trial(**{**row, "reports": {int(at): value for at, value in row["reports"].items()}}) for row in rows]

    @property
    def seconds(self) -> float:
        return sum(trial.seconds for trial in self.trials)

    def of(self, state: str) -> list[Trial]:
        return [trial for trial in self.trials if trial.state == state]

    def record(self, trial: Trial) -> None:
        """Keep a trial that came to its end."""
        append_jsonl(self.journal, asdict(trial))
        self.trials.append(trial)

    def next_settings(self, identity: Callable[[dict[str, Any]], str]) -> dict[str, Any] | None:
        """Settings that differ from all tried so far by `identity`; None when there seem to be no more."""
        number = len(self.trials)
        if number == 0:
            return dict(self.present)
        tried = {identity(trial.settings) for trial in self.trials}
        for draw in range(MAX_DRAWS):
            trial = self._study(number, draw).ask(self._distributions())
            settings = {name: _rounded(parameter, trial.params[name]) for name, parameter in self.parameters.items()}
            if identity(settings) not in tried:
                return settings
        return None

    def is_bad(self, reports: Mapping[int, float]) -> bool:
        """Whether a trial with these reports is behind the median of the finished ones at its newest point (Golovin et al. 2017)."""
        if not math.isfinite(reports[max(reports)]):
            return True
        trial = self._study(len(self.trials), 0).ask()
        for percent, value in sorted(reports.items()):
            trial.report(value, percent)
        return trial.should_prune()

    def _study(self, number: int, draw: int) -> optuna.Study:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        seed = int(np.random.SeedSequence([self.seed, number, draw]).generate_state(1)[0])
        # Once the sampler repeats itself, chance finds what is left.
        sampler = (
            optuna.samplers.RandomSampler(seed=seed) if draw else optuna.samplers.TPESampler(seed=seed, n_startup_trials=NUM_STARTUP_TRIALS)
        )
        pruner = optuna.pruners.MedianPruner(n_startup_trials=NUM_UNPRUNED_TRIALS, n_warmup_steps=0)
        study = optuna.create_study(direction="minimize", sampler=sampler, pruner=pruner)
        study.add_trials([self._as_optuna(trial) for trial in self.trials])
        return study

    def _as_optuna(self, trial: Trial) -> optuna.trial.FrozenTrial:
        import optuna

        distributions = self._distributions()
        known = {name: value for name, value in trial.settings.items() if _holds(distributions[name], name, value)}
        is_finished = trial.state == "finished"
        state = optuna.trial.TrialState.COMPLETE if is_finished else optuna.trial.TrialState.PRUNED
        return optuna.trial.create_trial(
            state=state, value=trial.value, params=known, distributions={name: distributions[name] for name in known},
            intermediate_values=trial.reports,
        )  # fmt: skip

    def _distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        return {name: _distribution(parameter) for name, parameter in self.parameters.items()}


def check_optuna() -> None:
    """Raises ConfigError where Optuna is not installed."""
    if find_spec("optuna") is None:
        raise ConfigError("A sweep needs Optuna, which is not installed", remedy="Install it: pip install 'giong[sweep]'.")


def _distribution(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    from optuna import distributions

    if parameter.choices is not None:
        return distributions.CategoricalDistribution(parameter.choices)
    assert parameter.low is not None and parameter.high is not None
    if parameter.kind == "int":
        return distributions.IntDistribution(int(parameter.low), int(parameter.high), log=parameter.log, step=int(parameter.step or 1))
    return distributions.FloatDistribution(parameter.low, parameter.high, log=parameter.log, step=parameter.step)


def _holds(distribution: optuna.distributions.BaseDistribution, name: str, value: Any) -> bool:
    import optuna

    try:
        optuna.trial.create_trial(params={name: value}, distributions={name: distribution}, value=0.0)
    except (ValueError, TypeError):
        return False
    return True


def _rounded(parameter: Parameter, value: Any) -> Any:
    if parameter.kind != "float":
        return value
    if parameter.step is not None:
        return float(f"{value:.10g}")
    assert parameter.low is not None and parameter.high is not None
    return min(parameter.high, max(parameter.low, float(f"{value:.{SIGNIFICANT_DIGITS}g}")))


def describe_space(parameters: Mapping[str, Parameter]) -> str:
    """The searched space in one line."""
    parts: Sequence[str] = [
        f"{name} {'/'.join(str(choice) for choice in parameter.choices)}"
        if parameter.choices is not None
        else f"{name} {parameter.low:g} to {parameter.high:g}{' (log)' if parameter.log else ''}"
        for name, parameter in parameters.items()
    ]
    return ", ".join(parts)


def _best(finished: Sequence[Trial], documents: Sequence[str]) -> BestOf:
    losses_TN = np.array([trial.losses for trial in finished])
    return best_of(losses_TN, np.array(finished[0].weights), documents, 0 if finished[0].number == 0 else None)


def search_result(search: Search, unit: str, documents: Sequence[str], ended: str) -> dict[str, Any]:
    """The trials, the winner, how sure it is and what giong.yaml needs. Raises StoryError where no trial came to its end."""
    finished = search.of("finished")
    if not finished:
        raise StoryError(
            f"None of {len(search.trials)} trials came to its end", place=str(search.folder),
            remedy="Lower the high end of train.learning_rate.",
        )  # fmt: skip
    best = _best(finished, documents)
    winner = finished[best.winner]
    return {
        "parameters": list(search.parameters), "unit": unit, "ended": ended, "num_requests": len(documents),
        "num_documents": len(set(documents)), "num_trials": len(search.trials),
        "trials": [
            {
                "number": trial.number, "settings": trial.settings, "state": trial.state, "value": trial.value, "run": trial.run,
                "seconds": trial.seconds, "last_percent": max(trial.reports, default=0),
            }
            for trial in search.trials
        ],
        "settings": winner.settings, "run": winner.run, "best": finite({**best.to_dict(), "winner": winner.number}),
        "note": optimism_note(search, best, winner, unit, len(set(documents))),
    }  # fmt: skip


def optimism_note(search: Search, best: BestOf, winner: Trial, unit: str, num_documents: int) -> str:
    """What the best of N is worth, in words."""
    counts = [
        f"{len(search.of(state))} {said}" for state, said in (("finished", "finished"), ("pruned", "stopped early"), ("failed", "failed"))
    ]
    where = f"{num_documents} document{'' if num_documents == 1 else 's'}"
    note = f"The best of {len(search.trials)} trials ({', '.join(counts)}) was chosen and measured on the same {where}, so its value is optimistic."
    if winner.number == 0:
        return f"{note} The settings as they were came out best: nothing to change."
    against = "the settings as they were" if search.trials[0].state == "finished" else "the mean of the finished trials"
    gain, corrected = best.gain, best.corrected_gain
    if math.isnan(best.optimism):
        return f"{note} It is {gain.point:.4f} {unit} better than {against}; how much of that is luck cannot be told from so little."
    note += (
        f" It is {gain.point:.4f} {unit} better than {against}, of which about {best.optimism:.4f} is expected to be luck of the choice: "
        f"{corrected.point:.4f} is left ({corrected.level * 100:.0f} % interval {corrected.low:.4f} to {corrected.high:.4f})."
    )
    if corrected.low <= 0:
        note += " That is no proof of an improvement."
    if num_documents < FEW_DOCUMENTS:
        note += " With so few documents the interval itself is rough, and rather too narrow."
    return note
