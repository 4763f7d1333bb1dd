"""A sweep on a small project and a random-weight twin: bad trials are stopped, killed sweeps go on, the test side is not read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_writing
import yaml
from command_line import giong

from giong.config import load, with_settings
from giong.config.search_space import check_space
from giong.config.sweep import NOT_SWEPT, sweepable
from giong.config.training import OF_THE_DAY
from giong.contracts import Event
from giong.errors import ConfigError, Interrupted
from giong.project import init, write_settings
from giong.sizing.shapes import DEFAULT_ADAPTER_SHARE
from giong.workspace import Project, read_json, read_jsonl, write_jsonl

GOOD_RATES = [0.02, 0.04, 0.08]


class Killed(BaseException):
    """Ends a walk wherever it is, as a kill does: nothing catches it."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Path:
    """A project with requests and a probe, and nothing trained."""
    folder = tmp_path_factory.mktemp("sweep")
    settings = {section: dict(values) for section, values in small_writing.SETTINGS.items()}
    settings["data"] |= {"test_share": 0.2, "calibration_share": 0.25}
    settings["model"] = {"name_or_path": str(tiny_folder("llama")), "dtype": "float32", "max_seq_length": 400}
    settings["method"] = {"lora_r": 2, "lora_dropout": 0.1}
    settings["train"] |= {"num_epochs": 3, "batch_rows": 4, "learning_rate": 1e-3}
    writing = small_writing.write_author(folder / "writing", num_documents=8, passages_per_document=2)
    project = init(folder / "voice", sources=[writing], settings=settings)
    walk(project, ["import", "synth", "probe"])
    return project.root


@pytest.fixture
def project(prepared: Path, tmp_path: Path) -> Project:
    return Project(shutil.copytree(prepared, tmp_path / "voice"))


def walk(project: Project, steps: Sequence[str], settings: dict[str, Any] | None = None, on: Callable[[Event], None] | None = None) -> list:
    """Do steps in this process; returns their events."""
    from giong.workflow import Story, perform

    events: list[Event] = []

    def emit(event: Event) -> None:
        events.append(event)
        if on:
            on(event)

    perform(Story(project, with_settings(load(project.config_path), settings or {}), emit=emit), steps)
    return events


def sweep_of(rates: Sequence[float], **more: Any) -> dict[str, Any]:
    return {"sweep": {"parameters": {"train.learning_rate": list(rates)}, "num_trials": len(rates) + 1, **more}}


def trials_of(project: Project) -> list[dict[str, Any]]:
    """The one journal, without what a clock says."""
    (journal,) = (project.root / "sweeps").glob("*/trials.jsonl")
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_jsonl(journal)]


def seed_that_begins_with(rates: Sequence[float], folder: Path, settings: dict[str, Any]) -> int:
    """A seed whose first drawn trials are these rates: which ones it draws before it learns does not depend on what they reach."""
    from giong.config import parse
    from giong.workflow.trials import Search, Trial

    for seed in range(200):
        search = Search(folder / str(seed), parse(settings).sweep.parameters, seed, {"train.learning_rate": 1e-3})
        while len(search.trials) <= len(rates):
            drawn = search.next_settings(str)
            if search.trials and drawn["train.learning_rate"] not in rates:
                break
            search.record(Trial(len(search.trials), drawn, "finished", "run", 1.0, [1.0], [1.0], {25: 1.0}))
        else:
            return seed
    pytest.fail("no such seed")


def test_a_bad_trial_is_stopped_and_the_winner_is_what_train_finds(project: Project, tmp_path: Path) -> None:
    settings = sweep_of([*GOOD_RATES, 1e-6])
    settings["sweep"]["seed"] = seed_that_begins_with(GOOD_RATES, tmp_path / "seeds", settings)
    events = walk(project, ["sweep"], settings)
    *good, bad = trials_of(project)
    assert [trial["state"] for trial in good] == ["finished"] * 4
    assert (bad["settings"], bad["state"], list(bad["reports"])) == ({"train.learning_rate": 1e-6}, "pruned", ["25"])
    steps = [event.data["step"] for event in events if event.kind == "step" and event.stage == "trial-4"]
    assert max(steps) < max(event.data["num_steps"] for event in events if event.kind == "step") / 2
    assert not (project.run_path(bad["run"]) / "results.json").exists()

    result = project.step_result("sweep")
    values = {trial["run"]: sum(trial["losses"]) / sum(trial["weights"]) for trial in good}
    assert result["run"] == min(values, key=lambda run: values[run])
    assert result["training"]["best"]["value"]["point"] == pytest.approx(min(values.values()))
    assert result["training"]["best"]["gain"]["low"] > 0, "a twin that hardly moved is worse than one that learnt"
    assert "best of 5 trials (4 finished, 1 stopped early, 0 failed)" in result["training"]["note"]
    assert any("5 trials, about" in event.message for event in events if event.kind == "notice")

    text = project.config_path.read_text()
    project.config_path.write_text(text.replace("train:\n", "train:  # how\n"))
    write_settings(project, {**result["settings"], "sampling.temperature": 0.0})
    assert "train:  # how\n" in project.config_path.read_text()
    events = walk(project, ["train"])
    assert [event.message for event in events if event.stage == "train" and event.kind == "stage_skipped"] == ["already trained"]
    model = read_json(project.model_path("voice") / "model.json")
    assert model["run"] == result["run"]
    assert len(model["sampling_trials"]) == 1, "given sampling is not chosen again"
    # With the winner in giong.yaml the same sweep is still the same.
    assert [event.kind for event in walk(project, ["sweep"], settings)] == ["stage_skipped"]


def test_being_watched_changes_no_byte(project: Project, prepared: Path, tmp_path: Path) -> None:
    walk(project, ["sweep"], sweep_of([0.02, 0.05]))
    runs = {trial["run"]: trial["settings"]["train.learning_rate"] for trial in trials_of(project)}
    alone = Project(shutil.copytree(prepared, tmp_path / "alone"))
    name = next(run for run, rate in runs.items() if rate == 0.05)
    walk(alone, ["sweep"], {"train.learning_rate": 0.05, **sweep_of([0.02, 0.05], num_trials=2, pruning=False)})
    files = [path / "runs" / name / "adapter" / "adapter_model.safetensors" for path in (project.root, alone.root)]
    assert read_jsonl(project.run_path(name) / "validation.jsonl"), "the first was watched"
    assert not (alone.run_path(name) / "validation.jsonl").exists()
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_killed_sweep_goes_on_and_trains_nothing_twice(project: Project, prepared: Path, tmp_path: Path) -> None:
    settings = {**sweep_of([0.02, 0.05]), "train.save_steps": 1, "train.keep_checkpoints": 1}
    walk(project, ["sweep"], settings)
    reference = trials_of(project)

    def kill(stage: str, kind: str, step: int | None = None) -> Callable[[Event], None]:
        def on(event: Event) -> None:
            if (event.stage, event.kind) == (stage, kind) and event.data.get("step") == step:
                raise Killed

        return on

    killed = Project(shutil.copytree(prepared, tmp_path / "killed"))
    # Without the test side every number must come out the same: what is not there cannot have been read.
    examples = read_jsonl(killed.examples_path)
    write_jsonl(killed.examples_path, [row for row in examples if row["side"] != "test"])
    assert len(read_jsonl(killed.examples_path)) < len(examples)
    for place, finished_before in ((kill("trial-1", "stage_finished"), 1), (kill("trial-2", "checkpoint", 4), 2)):
        with pytest.raises(Killed):
            walk(killed, ["sweep"], settings, place)
        assert len(trials_of(killed)) == finished_before
    events = walk(killed, ["sweep"], settings)
    assert trials_of(killed) == reference
    assert len(reference[0]["losses"]) == sum(row["side"] == "calibration" for row in examples)
    assert not {event.stage for event in events if event.kind == "step"} & {"trial-0", "trial-1"}
    # A checkpoint is announced when it is on the disk, perhaps some steps later.
    assert min(event.data["step"] for event in events if event.kind == "step") > 4
    for trial in reference[1:]:
        percents = [row["percent"] for row in read_jsonl(killed.run_path(trial["run"]) / "validation.jsonl")]
        assert percents == sorted(set(percents)), "a point was measured twice"
    # More trials go on from those that there are; the loser's checkpoints are gone, its result is not.
    more = walk(killed, ["sweep"], {**settings, "sweep": {**settings["sweep"], "num_trials": 5}})
    assert not [event for event in more if event.kind == "step"]
    assert trials_of(killed) == reference
    assert killed.step_result("sweep")["training"]["ended"] == "space"
    loser = next(t["run"] for t in reference[1:] if t["run"] != killed.step_result("sweep")["run"])
    assert sorted(path.name for path in killed.run_path(loser).iterdir()) == [
        "adapter", "events.jsonl", "results.json", "run.json", "validation.jsonl",
    ]  # fmt: skip


def test_a_run_that_leaves_the_numbers_is_a_failed_trial_and_a_wish_to_stop_is_not(project: Project) -> None:
    walk(project, ["sweep"], sweep_of([0.02, 1e30], pruning=False))
    states = {trial["settings"]["train.learning_rate"]: trial["state"] for trial in trials_of(project)}
    assert states == {1e-3: "finished", 0.02: "finished", 1e30: "failed"}

    from giong.workflow import Story, perform

    config = with_settings(load(project.config_path), sweep_of([0.02, 0.08], seed=1))
    with pytest.raises(Interrupted):
        perform(Story(project, config, should_stop=lambda: True), ["sweep"])


def test_time_is_up(project: Project) -> None:
    walk(project, ["sweep"], sweep_of([0.02, 0.05], max_seconds=1e-3))
    assert len(trials_of(project)) == 1
    result = project.step_result("sweep")
    assert result["training"]["ended"] == "time"
    assert "nothing to change" in result["training"]["note"]
    assert not [event for event in walk(project, ["sweep"], sweep_of([0.02, 0.05], max_seconds=1e-3)) if event.kind == "stage_skipped"]


def test_sampling_is_searched_on_the_tuned_arm(project: Project) -> None:
    parameters = {"sampling.temperature": [0.5, 1.0], "sampling.top_k": "1..4"}
    settings = {"sweep": {"parameters": parameters, "num_trials": 3, "max_requests": 3}}
    events = walk(project, ["sweep"], settings)
    result = project.step_result("sweep")
    assert result["training"] is None
    assert [trial["number"] for trial in result["sampling"]["trials"]] == [0, 1, 2]
    assert result["sampling"]["trials"][0]["settings"] == {"sampling.temperature": 0.0, "sampling.top_k": 0}
    assert {trial["run"] for trial in result["sampling"]["trials"]} == {path.name for path in project.list_runs()}
    assert all(0 <= trial["value"] <= 1 for trial in result["sampling"]["trials"] if trial["value"] is not None)
    asked = [event for event in events if event.kind == "stage_started" and event.stage.startswith("sampling-")]
    assert [event.message for event in asked] == ["3 requests"] * 3


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"train.optimizer": ["adamw", "muon"]}, "muon needs method.name full"),
        ({"train.l2_to_base": "0..0.1"}, "The sweep would try train.l2_to_base 0.1: `lora` moves an adapter"),
        ({"method.lora_r": "2..4096:log"}, "The sweep would try method.lora_r 4096: Rank 4096 is above the size of"),
        ({"method.num_layers": [1, 2]}, "A sweep over method.num_layers would change nothing"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_trial(project: Project, parameters: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        walk(project, ["sweep"], {"sweep": {"parameters": parameters}})
    assert expected in str(caught.value)
    assert caught.value.place.startswith("sweep.parameters")
    assert caught.value.remedy
    assert not (project.root / "sweeps").exists()
    assert not project.list_runs()


SPARSE, LAYERS, BOTTLENECK, PROMPT = ({"method.name": name} for name in ("sparse", "last_layers", "bottleneck", "prompt_tuning"))
SUITABLE: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "method.name": ({}, ["norm", "full"]),
    "method.lora_r": ({}, [4, 8]),
    "method.lora_alpha": ({}, [1.0, 8.0]),
    "method.lora_dropout": ({}, [0.0, 0.2]),
    "method.use_rslora": ({}, [True, False]),
    "method.use_dora": ({}, [True, False]),
    "method.init_lora_weights": ({"method.lora_dropout": None}, ["default", "pissa"]),
    "method.bias": ({}, ["none", "all"]),
    "method.bias_lr_ratio": ({"method.bias": "all"}, [1.0, 4.0]),
    "method.loraplus_lr_ratio": ({}, [1.0, 16.0]),
    "method.num_virtual_tokens": (PROMPT, [4, 8]),
    "method.prompt_tuning_init_text": (PROMPT, ["Dear", "Well"]),
    "method.num_layers": (LAYERS, [1, 2]),
    "method.layers_from": (LAYERS, ["last", "first"]),
    "method.train_head": (LAYERS, [True, False]),
    "method.train_norms": (LAYERS, [True, False]),
    "method.sparse_share": (SPARSE, [0.01, 0.02]),
    "method.sparse_score": (SPARSE, ["fisher", "random"]),
    "method.sparse_rows": (SPARSE, [4, 8]),
    "method.adapter_placement": (BOTTLENECK, ["houlsby", "pfeiffer"]),
    "method.adapter_size": (BOTTLENECK, [2, 4]),
    "method.adapter_share": (BOTTLENECK, [0.1, 0.2]),
    "train.learning_rate": ({}, [0.01, 0.02]),
    "train.num_epochs": ({}, [1.0, 2.0]),
    "train.batch_rows": ({}, [2, 8]),
    "train.warmup_share": ({}, [0.0, 0.2]),
    "train.schedule": ({}, ["linear", "constant"]),
    "train.optimizer": ({"method.name": "full"}, ["adamw", "muon"]),
    "train.weight_decay": ({}, [0.0, 0.1]),
    "train.max_grad_norm": ({}, [0.5, 2.0]),
    "train.eval_steps": ({"train.eval_steps": 5, "train.load_best_model_at_end": True}, [2, 4]),
    "train.load_best_model_at_end": ({"train.eval_steps": 5}, [True, False]),
    "train.replay_share": ({}, [0.0, 0.1]),
    "train.replay_path": ({"train.replay_share": 0.1}, ["one.txt", "two.txt"]),
    "train.kl_weight": ({}, [0.0, 0.1]),
    "train.l2_to_base": ({"method.name": "full"}, [0.0, 0.1]),
    "train.neftune_noise_alpha": ({}, [None, 5.0]),
    "train.surprise_weight": ({}, [0.0, 1.0]),
    "train.early_stopping_patience": ({"train.eval_steps": 5}, [None, 2]),
    "train.early_stopping_memorisation": ({"train.eval_steps": 5}, [None, 0.02]),
    "sampling.temperature": ({}, [0.0, 0.7]),
    "sampling.top_p": ({"sampling.temperature": 0.7}, [0.8, 1.0]),
    "sampling.top_k": ({"sampling.temperature": 0.7}, [0, 40]),
    "sampling.repetition_penalty": ({}, [1.0, 1.1]),
    "sampling.no_repeat_ngram_size": ({}, [0, 4]),
}
"""Every setting that a sweep can take: a project that reads it, and two values to choose among."""


@pytest.fixture(scope="module")
def planned(prepared: Path, tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Any:
    """A story whose model (a twin with biases and a head of its own) is loaded once, to be planned under many settings."""
    from giong.workflow import Story

    project = Project(shutil.copytree(prepared, tmp_path_factory.mktemp("planned") / "voice"))
    write_settings(project, {"model.name_or_path": str(tiny_folder("qwen2", tie_word_embeddings=False))})
    walk(project, ["probe"])
    for name in ("one", "two"):
        (project.root / f"{name}.txt").write_text(f"General text number {name}, which is of no author. " * 40)
    return Story(project)


@pytest.mark.parametrize("name", sweepable())
def test_every_setting_can_be_swept_where_it_is_read(planned: Any, name: str) -> None:
    """Trial 0 is the run of the settings as they are, and the choices lead to others."""
    from giong.workflow.sweeping import _as_if, _check_model, _present_sampling, _present_training, _SamplingTrials, _TrainingTrials

    settings, choices = SUITABLE[name]
    config = with_settings(load(planned.project.config_path), {**settings, "sweep": {"parameters": {name: choices}}})
    parameters = config.sweep.parameters
    check_space(config, parameters, partial(_check_model, planned))
    with _as_if(planned, config):
        if name.startswith("sampling."):
            present = _present_sampling(planned, parameters)
            trials: Any = _SamplingTrials(planned, planned.examples_of("calibration"), lambda: None, None, "run")
        else:
            present = _present_training(planned, parameters)
            trials = _TrainingTrials(planned, planned.examples_of("calibration"))
        assert list(present) == [name]
        assert trials.identity(present) == trials.identity({})
        assert len({trials.identity({name: choice}) for choice in choices}) == 2


OTHER_DAY = {
    "save_seconds": 7.0, "save_steps": 3, "keep_checkpoints": 5, "activation_checkpointing": "all", "activation_offload": True,
    "num_processes": 2, "max_tokens_per_pack": 64,
}  # fmt: skip


def test_what_no_result_depends_on_begins_no_other_search_or_run_and_cannot_be_swept(planned: Any) -> None:
    from giong.workflow.sweeping import _as_if, _search_keys
    from giong.workflow.training import plan_run

    def keys(**train: Any) -> tuple[str, ...]:
        config = with_settings(load(planned.project.config_path), {f"train.{name}": value for name, value in train.items()})
        with _as_if(planned, config):
            return *_search_keys(planned, {}, {}, planned.examples_of("calibration")), plan_run(planned, 1.0).name

    assert set(OTHER_DAY) == set(OF_THE_DAY)
    for name, value in OTHER_DAY.items():
        assert keys(**{name: value}) == keys(), name
    assert keys(batch_rows=3) != keys()
    assert {f"train.{name}" for name in OF_THE_DAY} <= NOT_SWEPT.keys()


def test_the_size_of_bottleneck_adapters_as_it_is_is_a_number(planned: Any) -> None:
    from giong.workflow.sweeping import _as_if, _present_training

    names = ("method.adapter_size", "method.adapter_share")
    config = with_settings(
        load(planned.project.config_path), {**BOTTLENECK, "sweep": {"parameters": {name: SUITABLE[name][1] for name in names}}}
    )
    with _as_if(planned, config):
        present = _present_training(planned, config.sweep.parameters)
    assert present["method.adapter_share"] == DEFAULT_ADAPTER_SHARE
    assert isinstance(present["method.adapter_size"], int)


def test_the_command_line(project: Project) -> None:
    text = project.config_path.read_text()
    project.config_path.write_text(f"# my own words\n{text}")
    command = ("sweep", "--project", project.root, "--trials", "2")
    giong(*command, "--set", "train.learning_rat=1e-5..1e-3").refused(ConfigError, "did you mean `train.learning_rate`?")
    done = giong(*command, "--set", "train.learning_rate=1e-2..5e-2:log", "--no-pruning", "--apply").worked()
    result = project.step_result("sweep")
    assert "0 (as it was)" in done.out
    assert result["training"]["note"].split(" (")[0] in " ".join(done.out.split())
    assert done.out.rstrip().endswith(result["yaml"].rstrip())
    assert "2 trials, about" in done.told
    changed = project.config_path.read_text()
    assert changed.startswith("# my own words\n")
    assert yaml.safe_load(changed)["train"]["learning_rate"] == result["settings"]["train.learning_rate"]
    # Without --set the section of giong.yaml counts.
    project.config_path.write_text(changed + "sweep:\n  parameters:\n    train.learning_rate: 1.0e-2..5.0e-2:log\n  pruning: false\n")
    again = giong(*command).worked()
    assert "sweep: nothing changed" in again.told
    assert json.dumps(again.out.splitlines()[-3:]) == json.dumps(done.out.splitlines()[-3:])
