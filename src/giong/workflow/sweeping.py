"""Step `sweep`: search over training settings, then over the sampling of the tuned model, on the validation documents.

Validation is the calibration side: never trained on, and not the frozen test. A trial is an ordinary run, named by its content,
so `giong train` with the winning settings finds the winner trained. A reader may question that points of trials with different
numbers of epochs are compared at the same share of the run and not at the same epoch: docs/decisions/0006-sweep.md.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from giong.config import Parameter, ProjectConfig, TrainConfig, with_settings
from giong.config.editing import settings_yaml
from giong.config.search_space import check_space, describe_settings
from giong.config.training import IN_KEYS, OF_THE_DAY
from giong.contracts import Emit, Event, Example, Request, Sampling
from giong.data.examples import spread
from giong.engine.distributed import ALONE
from giong.errors import StoryError, TrainingError
from giong.evaluation.metrics.meaning import closed_words, key_recall
from giong.evaluation.metrics.text import rep_n, words
from giong.sizing.defaults import resolve_training
from giong.sizing.moving import check_anchor, check_method
from giong.sizing.shapes import DEFAULT_ADAPTER_SHARE
from giong.sizing.units import format_seconds
from giong.workflow.arms import announce_answers, answer_tokens
from giong.workflow.estimating import estimate_run, planned_run, resolved_of
from giong.workflow.probing import probe
from giong.workflow.starting import started
from giong.workflow.story import Stage, Story, examples_hash
from giong.workflow.training import Run, beside_examples, perform_run, plan_run, rows_of, score_answers, trained_rows, tuned
from giong.workflow.trials import Measured, Search, Trial, TrialPruned, Watch, check_optuna, describe_space, search_result
from giong.workspace import append_jsonl, content_hash, mend_torn_end, read_jsonl, remove_folder

REPORT_PERCENTS = (25, 50, 75)
"""Where on its way a training trial is measured, and stopped if it is bad."""
ANSWER_PERCENTS = (33, 67)
"""The same for a trial of sampling settings, in shares of the requests."""
SCORING_SHARE = 1 / 3
"""Of a training token's time that a scored token takes: the forward pass alone."""
LOOPING = 0.02
"""Share of repeated 4-grams above which an answer counts as looping."""


def sweep(story: Story) -> None:
    """Do the searches that `sweep.parameters` asks for; leaves steps/sweep.json with the winner and how sure it is."""
    check_optuna()
    config = story.config.sweep
    validation = story.examples_of("calibration")
    if not validation:
        raise StoryError("There are no validation requests", place=str(story.project.examples_path), remedy="Run `giong synth` first.")
    parameters = dict(config.parameters) or default_parameters(story)
    # What cannot be trained is an error now and not in the seventh trial.
    check_space(story.config, parameters, partial(_check_model, story))
    of_training = {name: space for name, space in parameters.items() if not name.startswith("sampling.")}
    of_sampling = {name: space for name, space in parameters.items() if name.startswith("sampling.")}
    keys = _search_keys(story, of_training, of_sampling, validation)
    # `max_seconds` ends a sweep early and changes nothing of what it found.
    key = content_hash(keys[0], keys[1] if of_sampling else "", config.num_trials)
    if story.is_current("sweep", key):
        return
    searches: list[Search] = []
    result: dict[str, Any] = {"training": None, "sampling": None}
    settings: dict[str, Any] = {}
    if of_training:
        search = _open_search(story, f"training-{keys[0]}", of_training, _present_training(story, of_training))
        _announce_training(story, search, validation)
        result["training"] = _run_search(story, search, _TrainingTrials(story, validation), "nats per token", validation)
        settings |= result["training"]["settings"]
        searches.append(search)
    with _as_if(story, with_settings(story.config, settings)):
        # Done unless someone deleted it since, or only sampling is swept.
        run = plan_run(story, 1.0)
        if not run.is_finished:
            perform_run(story, run, "train")
    if of_sampling:
        requests = spread(validation, config.max_requests)
        search = _open_search(
            story, f"sampling-{content_hash(keys[1], run.record['key'])}", of_sampling, _present_sampling(story, of_sampling)
        )
        announce_answers(story, "sweep", len(requests) * max(0, config.num_trials - len(search.trials)))
        with tuned(story, run.artifact, run.name) as (local, adapter):
            trials = _SamplingTrials(story, requests, local.predictor, adapter, run.name)
            result["sampling"] = _run_search(story, search, trials, "of the key items lost", requests)
        settings |= result["sampling"]["settings"]
        searches.append(search)
    result |= {"settings": settings, "yaml": settings_yaml(settings), "run": run.name}
    is_complete = all(part is None or part["ended"] != "time" for part in (result["training"], result["sampling"]))
    story.project.finish_step("sweep", key if is_complete else f"{key} unfinished", [search.journal for search in searches], result)


def default_parameters(story: Story) -> dict[str, Parameter]:
    """Learning rate and epochs around what giong chooses by itself for this model and amount of writing."""
    plain = TrainConfig.model_validate(story.config.train.model_dump() | {"learning_rate": None, "num_epochs": None})
    resolved = resolve_training(story.config.method, plain, story.local.loaded.shape, len(story.training_examples)).train
    assert resolved.learning_rate is not None and resolved.num_epochs is not None
    # Of the defaults and not of giong.yaml: else a winner that was written there would begin another search.
    rate, epochs = resolved.learning_rate, resolved.num_epochs
    found = {
        "train.learning_rate": Parameter(name="train.learning_rate", low=_plain(rate / 5), high=_plain(rate * 5), log=True),
        "train.num_epochs": Parameter(name="train.num_epochs", low=1, high=2 * max(1.0, epochs), step=1),
    }
    story.notice("sweep", f"no parameters are named in sweep.parameters: {describe_space(found)}")
    return found


def _plain(value: float) -> float:
    return float(f"{value:.2g}")


def _check_model(story: Story, config: ProjectConfig) -> None:
    """Raise ConfigError where a trial with these settings could not be made of this model."""
    check_anchor(config.method, config.train)
    check_method(story.local.loaded.shape, started(story.project, config.method))


def _search_keys(
    story: Story, of_training: Mapping[str, Parameter], of_sampling: Mapping[str, Parameter], validation: Sequence[Example]
) -> tuple[str, str]:
    """What the trials of each search depend on. The values of swept settings are no part: a winner may have been written there."""

    def fixed(section: str, values: dict[str, Any], swept: Mapping[str, Parameter]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name not in OF_THE_DAY and f"{section}.{name}" not in swept}

    config = story.config
    common = [
        story.model_identity, probe(story)["dtype"], story.local.loaded.max_seq_length, examples_hash(story.training_examples),
        examples_hash(validation), fixed("method", config.method.model_dump(), of_training),
        {**fixed("train", config.train.model_dump(), of_training), **IN_KEYS}, config.objective, config.sweep.seed, config.sweep.pruning,
        of_training, *beside_examples(story, started(story.project, config.method)),
        *([config.evaluation.num_canaries, config.evaluation.seed] if config.evaluation.num_canaries else []),
    ]  # fmt: skip
    sampling = fixed("sampling", config.sampling.model_dump(), of_sampling)
    return content_hash(*common), content_hash(*common, of_sampling, sampling, config.sweep.max_requests)


def _open_search(story: Story, name: str, parameters: Mapping[str, Parameter], present: Mapping[str, Any]) -> Search:
    folder = story.project.root / "sweeps" / name
    if story.force and folder.is_dir():
        remove_folder(folder)
    search = Search(folder, parameters, story.config.sweep.seed, present)
    if search.trials:
        story.notice("sweep", f"going on after {len(search.trials)} trials, in {folder.relative_to(story.project.root)}")
    return search


def _present_training(story: Story, parameters: Mapping[str, Parameter]) -> dict[str, Any]:
    """The swept settings as they are, those that giong chooses by itself resolved."""
    recorded = plan_run(story, 1.0).record["settings"]
    present: dict[str, Any] = {}
    for name in parameters:
        section, _, key = name.partition(".")
        # A record leaves out what is switched off and what its method does not read; a share of the parameters has become a width.
        present[name] = recorded[section].get(key, getattr(getattr(story.config, section), key))
        if name == "method.adapter_share" and present[name] is None:
            present[name] = DEFAULT_ADAPTER_SHARE
    return present


def _present_sampling(story: Story, parameters: Mapping[str, Parameter]) -> dict[str, Any]:
    values = asdict(Sampling(**story.config.sampling.chosen()))
    return {name: values[name.partition(".")[2]] for name in parameters}


@contextlib.contextmanager
def _as_if(story: Story, config: ProjectConfig, emit: Emit | None = None) -> Iterator[None]:
    """The same story, and the model it has loaded, under other settings. Nothing that is swept changes what is loaded."""
    previous = story.config, story.emit
    story.config, story.emit = config, emit or story.emit
    try:
        yield
    finally:
        story.config, story.emit = previous


class _TrainingTrials:
    """A trial is a run; its loss is the likelihood of the author's own answers in the validation documents."""

    def __init__(self, story: Story, validation: Sequence[Example]) -> None:
        self.story, self.validation = story, list(validation)
        self.hash = examples_hash(validation)
        self.base = story.config
        self._said: set[str] = set()
        self._plans: dict[str, Run] = {}

    def identity(self, settings: dict[str, Any]) -> str:
        return self._plan(settings).record["key"]

    def stage(self, number: int) -> str:
        return f"trial-{number}"

    def _plan(self, settings: dict[str, Any]) -> Run:
        key = content_hash(settings)
        if key not in self._plans:
            with _as_if(self.story, with_settings(self.base, settings)):
                self._plans[key] = plan_run(self.story, 1.0)
        return self._plans[key]

    def measure(self, number: int, settings: dict[str, Any], watch: Watch | None) -> Measured:
        """Train to the end and measure what was saved. Raises TrialPruned, or TrainingError where it falls apart."""
        run, story = self._plan(settings), self.story
        if story.processes and run.record["settings"]["method"]["name"] == "full":
            # Its weights lie in shards while it trains: the first process could not measure it alone.
            watch = None
        reports = self._reports(run)
        if watch:
            for percent, value in reports.items():
                watch(percent, value)
        forward = story.emit

        def emit(event: Event) -> None:
            # What every trial says about its settings is said once.
            if event.kind != "notice" or event.message not in self._said:
                forward(event)
            self._said.add(event.message)
            if watch and event.kind == "step" and event.stage == stage:
                self._report(run, event, reports, watch)

        stage = self.stage(number)
        with _as_if(story, with_settings(self.base, settings), emit):
            perform_run(story, run, stage)
            with tuned(story, run.artifact, run.name) as (local, adapter):
                scores = score_answers(local, adapter, self.validation)
        if "local" in story.__dict__:
            story.local.clear_adapters()
        return Measured(run.name, [score.nll for score in scores], [float(len(score.logprobs)) for score in scores], reports)

    def _report(self, run: Run, event: Event, reports: dict[int, float], watch: Watch) -> None:
        step, num_steps = event.data["step"], event.data["num_steps"]
        due = [percent for percent in REPORT_PERCENTS if step < num_steps and step == max(1, round(num_steps * percent / 100))]
        if not due or due[-1] in reports:
            return
        model = self.story.local.loaded.model
        training = model.training
        model.eval()
        scores = score_answers(self.story.local, None, self.validation)
        model.train(training)
        value = sum(score.nll for score in scores) / sum(len(score.logprobs) for score in scores)
        reports[due[-1]] = value
        # With the run and not with the sweep: it belongs to what was trained, and a killed trial does not measure it again.
        append_jsonl(run.folder / "validation.jsonl", {"percent": due[-1], "value": value, "examples_hash": self.hash})
        watch(due[-1], value)

    def _reports(self, run: Run) -> dict[int, float]:
        path = run.folder / "validation.jsonl"
        mend_torn_end(path)
        rows = read_jsonl(path) if path.is_file() else []
        return {row["percent"]: row["value"] for row in rows if row["examples_hash"] == self.hash}

    def reports(self, settings: dict[str, Any]) -> dict[int, float]:
        """What a trial that did not come to its end had shown."""
        return self._reports(self._plan(settings))

    def name(self, settings: dict[str, Any]) -> str:
        return self._plan(settings).name

    def tidy(self, search: Search, winner: int) -> None:
        """Remove the checkpoints that nobody goes on from: those of the trials that lost. Their runs stay."""
        for trial in search.trials:
            checkpoints = self.story.project.run_path(trial.run) / "checkpoints"
            if trial.number not in (0, winner) and checkpoints.is_dir():
                remove_folder(checkpoints)


class _SamplingTrials:
    """A trial is a set of sampling settings; its loss is the share of key items lost, all of them where an answer loops or never ends."""

    def __init__(self, story: Story, requests: Sequence[Example], predictor: Callable, adapter: str | None, run: str) -> None:
        self.story, self.predictor, self.adapter, self.run = story, predictor, adapter, run
        self.requests = [Request(example.id, example.messages) for example in requests]
        self.texts = ["\n".join(message.content for message in example.messages) for example in requests]
        self.closed = closed_words(self.texts)
        self.limit = answer_tokens(story)
        self._reports: dict[int, float] = {}

    def _sampling(self, settings: Mapping[str, Any]) -> Sampling:
        given = {name.partition(".")[2]: value for name, value in settings.items()}
        return Sampling(**self.story.config.sampling.chosen() | given, max_new_tokens=self.limit)

    def identity(self, settings: dict[str, Any]) -> str:
        return content_hash(self._sampling(settings))

    def stage(self, number: int) -> str:
        return f"sampling-{number}"

    def measure(self, number: int, settings: dict[str, Any], watch: Watch | None) -> Measured:
        """Answer the requests in parts and count. Raises TrialPruned."""
        losses: list[float] = []
        self._reports = {}
        predictor = self.predictor("tuned", self.adapter, self._sampling(settings))
        num = len(self.requests)
        percents = {end: percent for percent in ANSWER_PERCENTS if watch and 0 < (end := round(num * percent / 100)) < num}
        stage = self.stage(number)
        with Stage(self.story, stage, f"{num} requests"):
            for start, end in zip([0, *percents], [*percents, num]):
                replies = predictor.predict(self.requests[start:end], self.story.progress(stage, "answers"))
                for text, reply in zip(self.texts[start:end], replies):
                    usable = reply.finish_reason == "stop" and rep_n(words(reply.text), 4) <= LOOPING
                    losses.append(1.0 - key_recall(text, reply.text, self.closed) if usable else 1.0)
                if watch and end in percents:
                    self._reports[percents[end]] = sum(losses) / len(losses)
                    watch(percents[end], self._reports[percents[end]])
        return Measured(self.run, losses, [1.0] * len(losses), self._reports)

    def reports(self, settings: dict[str, Any]) -> dict[int, float]:
        return self._reports

    def name(self, settings: dict[str, Any]) -> str:
        return self.run

    def tidy(self, search: Search, winner: int) -> None:
        """Nothing was left behind."""


def _run_search(
    story: Story, search: Search, trials: _TrainingTrials | _SamplingTrials, unit: str, items: Sequence[Example]
) -> dict[str, Any]:
    """Trials up to the number asked for, the winner, and how sure it is."""
    config, ended = story.config.sweep, "trials"
    documents = [example.document_id for example in items]
    with Stage(story, "sweep", f"{config.num_trials} trials over {describe_space(search.parameters)}"):
        while len(search.trials) < config.num_trials:
            story.emit(Event("progress", "sweep", data={"done": len(search.trials), "total": config.num_trials, "unit": "trials"}))
            story.check_stop()
            if config.max_seconds is not None and search.seconds >= config.max_seconds:
                ended = "time"
                story.notice("sweep", f"stopped after {format_seconds(search.seconds)}, as sweep.max_seconds says")
                break
            settings = search.next_settings(trials.identity)
            if settings is None:
                ended = "space"
                story.notice("sweep", f"after {len(search.trials)} trials nothing new was found to try")
                break
            _perform_trial(story, search, trials, settings, unit)
    result = search_result(search, unit, documents, ended)
    trials.tidy(search, result["best"]["winner"])
    return result


def _perform_trial(story: Story, search: Search, trials: _TrainingTrials | _SamplingTrials, settings: dict[str, Any], unit: str) -> None:
    number, started = len(search.trials), time.monotonic()
    reports: dict[int, float] = {}

    def watch(percent: int, value: float) -> None:
        reports[percent] = value
        if search.is_bad(reports):
            raise TrialPruned(percent, value)

    def ended(state: str, measured: Measured | None = None) -> Trial:
        seconds = time.monotonic() - started
        if measured is None:
            story.emit(Event("stage_finished", trials.stage(number), data={"seconds": seconds}))
            measured = Measured(trials.name(settings), [], [], trials.reports(settings))
        return Trial(number, settings, state, measured.run, seconds, measured.losses, measured.weights, measured.reports)  # type: ignore[arg-type]

    story.notice("sweep", f"trial {number}: {describe_settings(settings)}{' (as it is)' if number == 0 else ''}")
    try:
        # Trial 0 is what the others are compared with, and often trained before: it is not stopped.
        measured = trials.measure(number, settings, watch if story.config.sweep.pruning and number else None)
    except TrialPruned as stopped:
        search.record(ended("pruned"))
        story.notice("sweep", f"trial {number}: stopped at {stopped.percent} %, {stopped.value:.4f} {unit} is behind the others")
        return
    except TrainingError as error:
        # A run that fell apart is a bad trial; anything else that went wrong is no trial at all.
        search.record(ended("failed"))
        story.notice("sweep", f"trial {number}: {error.message}")
        return
    if not all(map(math.isfinite, measured.losses)):
        search.record(ended("failed"))
        story.notice("sweep", f"trial {number}: the trained model gives no likelihood")
        return
    search.record(ended("finished", measured))
    story.notice("sweep", f"trial {number}: {search.trials[-1].value:.4f} {unit}")


def _announce_training(story: Story, search: Search, validation: Sequence[Example]) -> None:
    """Say beforehand what the trials take."""
    remaining = story.config.sweep.num_trials - len(search.trials)
    if remaining <= 0:
        return
    run = plan_run(story, 1.0)
    rows = trained_rows(story, run.examples)
    num_tokens = planned_run(story, run, rows).num_tokens
    speed, per_epoch = num_tokens / estimate_run(story, run, rows).seconds, num_tokens / resolved_of(story, run).train.num_epochs
    points = 1 + len(REPORT_PERCENTS) * story.config.sweep.pruning
    # Answers are scored by one process alone.
    scored = points * SCORING_SHARE * rows_of(story, validation)[1].num_tokens * (story.processes or ALONE).size
    mean, most = (format_seconds(remaining * (per_epoch * epochs + scored) / speed) for epochs in _epochs(story, search))
    at_most = "" if mean == most else f", at most {most}"
    sooner = ", less for every trial that is stopped early" if story.config.sweep.pruning else ""
    story.notice("sweep", f"{remaining} trials, about {mean}{at_most}{sooner}")


def _epochs(story: Story, search: Search) -> tuple[float, float]:
    """(mean, largest) number of epochs of the trials to come."""
    parameter = search.parameters.get("train.num_epochs")
    values = [] if parameter is None else [value for value in parameter.choices or (parameter.low, parameter.high) if value is not None]
    values = values or [plan_run(story, 1.0).record["settings"]["train"]["num_epochs"]]
    return sum(values) / len(values), max(values)
