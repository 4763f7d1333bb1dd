"""The parts of a sweep that need no model: what may be swept, what is tried next, how optimistic the best is, editing giong.yaml."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from giong.cli import main
from giong.config import MethodConfig, ProjectConfig, load, parse, with_settings
from giong.config.editing import settings_yaml, with_written
from giong.config.search_space import check_space
from giong.config.sweep import NOT_SWEPT, SECTIONS, SweepConfig, parameters_from_text
from giong.config.training import OF_METHOD
from giong.errors import ConfigError, StoryError
from giong.evaluation.metrics.selection import best_of
from giong.project import init, sweep
from giong.workflow.trials import Search, Trial, TrialPruned, check_optuna, search_result


def swept(parameters: dict[str, Any]) -> ProjectConfig:
    return parse({"sweep": {"parameters": parameters}})


SPACES: list[tuple[str, Any, tuple[Any, ...]]] = [
    ("train.learning_rate", {"low": "1e-5", "high": 1e-3, "log": True}, ("float", 1e-5, 1e-3, True, None)),
    ("train.learning_rate", "1e-5..1e-3:log", ("float", 1e-5, 1e-3, True, None)),
    ("method.lora_r", "4..64:log", ("int", 4, 64, True, None)),
    ("train.num_epochs", "1..4:step=0.5", ("float", 1, 4, False, None)),
    ("method.lora_r", [8, "16", 32], ("choices", None, None, False, [8, 16, 32])),
    ("train.learning_rate", "1e-4,2e-4", ("choices", None, None, False, [1e-4, 2e-4])),
    ("train.schedule", "linear,constant", ("choices", None, None, False, ["linear", "constant"])),
]


@pytest.mark.parametrize(("name", "space", "expected"), SPACES)
def test_spaces_are_read_with_the_types_of_their_settings(name: str, space: Any, expected: tuple[Any, ...]) -> None:
    parameter = swept({name: space}).sweep.parameters[name]
    assert (parameter.kind, parameter.low, parameter.high, parameter.log, parameter.choices) == expected
    assert [type(choice) for choice in parameter.choices or ()] == [type(choice) for choice in expected[4] or ()]


REFUSED: list[tuple[str, Any, str]] = [
    ("train.learning_rat", [1, 2], "did you mean `train.learning_rate`?"),
    ("learning_rate", [1, 2], "did you mean `train.learning_rate`?"),
    ("data.test_share", [0.1, 0.2], "no setting `data.test_share` to sweep; there are method.name"),
    ("train.seed", [1, 2], "the best of several seeds is luck"),
    ("method.lora_r", {"low": 0, "high": 8}, "0 cannot be a value of method.lora_r: input should be greater than or equal to 1"),
    ("method.lora_r", [8, 8.5], "8.5 cannot be a value of method.lora_r"),
    ("method.lora_dropout", "0..1", "1 cannot be a value of method.lora_dropout: input should be less than 1"),
    ("train.schedule", "0..1", "train.schedule is not a number"),
    ("train.schedule", ["cosine", "lin"], "'lin' cannot be a value of train.schedule"),
    ("train.learning_rate", "1e-3..1e-5", "low (0.001) must be smaller than high (1e-05)"),
    ("train.weight_decay", "0..0.1:log", "cannot begin at 0"),
    ("train.num_epochs", "1..4:step=0.7", "must be low (1) plus whole steps of 0.7"),
    ("train.num_epochs", {"low": 1, "hi": 4}, "unknown key `hi`; did you mean `high`?"),
    ("train.num_epochs", {"low": 1}, "needs low and high"),
    ("train.num_epochs", 3, "two or more different values"),
    ("train.num_epochs", {"choices": [1, 2], "low": 1}, "not both"),
]


@pytest.mark.parametrize(("name", "space", "expected"), REFUSED)
def test_what_cannot_be_swept_is_one_sentence(name: str, space: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        swept({name: space})
    assert expected in str(caught.value)
    assert f"`sweep.parameters.{name}`" in caught.value.message


def test_a_mistake_in_the_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "giong.yaml"
    path.write_text("sweep:\n  num_trials: 5\n  parameters:\n    method.lora_r: [8, 16]\n    train.learning_rat: 1e-5..1e-3:log\n")
    with pytest.raises(ConfigError, match="learning_rate") as caught:
        load(path)
    assert caught.value.place == f"{path}:5"


# Held against the whole project


def check(settings: dict[str, Any], parameters: dict[str, Any]) -> None:
    config = with_settings(ProjectConfig(), {**settings, "sweep": {"parameters": parameters}})
    check_space(config, config.sweep.parameters)


BIASES, EVALUATED = {"method.bias": "all"}, {"train.eval_steps": 5}
GO_TOGETHER: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (BIASES, {"method.bias_lr_ratio": [1, 4]}),
    (EVALUATED, {"train.early_stopping_patience": [1, 4]}),
    (EVALUATED, {"train.early_stopping_memorisation": "0.01..0.1"}),
    (EVALUATED, {"train.load_best_model_at_end": [True, False]}),
    ({"train.replay_share": 0.1}, {"train.replay_path": ["a.txt", "b.txt"]}),
    ({}, {"method.bias": ["all", "lora_only"], "method.bias_lr_ratio": [1, 4]}),
    ({}, {"method.name": ["lora", "last_layers"], "method.lora_r": [8, 16], "method.num_layers": [1, 2]}),
    ({}, {"sampling.temperature": "0..1", "sampling.top_p": [0.9, 1]}),
]


@pytest.mark.parametrize(("settings", "parameters"), GO_TOGETHER)
def test_what_goes_with_the_other_settings_can_be_swept(settings: dict[str, Any], parameters: dict[str, Any]) -> None:
    check(settings, parameters)


FORBIDDEN: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"method.bias_lr_ratio": [1, 4]}, "try method.bias_lr_ratio 4: Setting `method`: bias_lr_ratio is for biases that move"),
    ({}, {"train.early_stopping_patience": [1, 4]}, "early_stopping_patience needs eval_steps"),
    (
        {"objective.name": "pretrain"},
        {"train.surprise_weight": "0..1"},
        "try train.surprise_weight 1: train.surprise_weight weighs answers",
    ),
    ({}, {"train.optimizer": ["adamw", "muon"]}, "muon needs method.name full"),
    # Each goes with the settings as they are, and with some of the others' values.
    (BIASES, {"method.bias": ["all", "none"], "method.bias_lr_ratio": [1, 4]}, "try method.bias none, method.bias_lr_ratio 4: "),
    (
        {"method.name": "full"},
        {"train.learning_rate": "1e-5..1e-3:log", "train.optimizer": ["adamw", "muon"], "method.name": ["full", "norm"]},
        "try train.optimizer muon, method.name norm: ",
    ),
]


@pytest.mark.parametrize(("settings", "parameters", "expected"), FORBIDDEN)
def test_what_the_other_settings_forbid_is_one_sentence(settings: dict[str, Any], parameters: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(settings, parameters)
    assert expected in caught.value.message
    assert "Setting ``" not in caught.value.message
    assert (caught.value.place, bool(caught.value.remedy)) == ("sweep.parameters", True)


UNREAD: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    # `norm` reads no setting of a method but its name.
    *(({"method.name": "norm"}, {name: choices}, name, "method.name ") for name, choices in (
        ("method.lora_r", [4, 8]), ("method.lora_alpha", [4, 8]), ("method.lora_dropout", [0, 0.1]), ("method.use_rslora", [True, False]),
        ("method.use_dora", [True, False]), ("method.init_lora_weights", ["default", "pissa"]), ("method.bias", ["all", "none"]),
        ("method.loraplus_lr_ratio", [1, 16]), ("method.num_virtual_tokens", [4, 8]), ("method.prompt_tuning_init_text", ["a", "b"]),
        ("method.num_layers", [1, 2]), ("method.layers_from", ["last", "first"]), ("method.train_head", [True, False]),
        ("method.train_norms", [True, False]), ("method.sparse_share", [0.1, 0.2]), ("method.sparse_score", ["fisher", "random"]),
        ("method.sparse_rows", [4, 8]), ("method.adapter_placement", ["houlsby", "pfeiffer"]), ("method.adapter_size", [4, 8]),
        ("method.adapter_share", [0.1, 0.2]),
    )),
    ({"method.name": "lora"}, {"method.name": ["norm", "full"], "method.lora_r": [4, 8]}, "method.lora_r", "method.name lora or qlora"),
    ({"method.name": "sparse", "method.sparse_score": "random"}, {"method.sparse_rows": [4, 8]}, "method.sparse_rows", "fisher or gradient"),
    ({}, {"train.eval_steps": [4, 8]}, "train.eval_steps", "train.load_best_model_at_end or early stopping"),
    ({}, {"sampling.top_p": [0.8, 0.9]}, "sampling.top_p", "a sampling.temperature above 0"),
    ({"sampling.temperature": 0.0}, {"sampling.top_k": [10, 20]}, "sampling.top_k", "a sampling.temperature above 0"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "parameters", "name", "expected"), UNREAD)
def test_what_no_trial_would_read_is_one_sentence(settings: dict[str, Any], parameters: dict[str, Any], name: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(settings, parameters)
    assert caught.value.message.startswith(f"A sweep over {name} would change nothing: it is read with ")
    assert expected in caught.value.message
    assert (caught.value.place, bool(caught.value.remedy)) == (f"sweep.parameters.{name}", True)


def test_every_setting_of_one_method_alone_is_among_those_that_another_does_not_read() -> None:
    named = {name for _, parameters, *_ in UNREAD for name in parameters}
    # A ratio is refused by its own section before: its biases do not move.
    assert {f"method.{key}" for keys in OF_METHOD.values() for key in keys} - set(NOT_SWEPT) - named == {"method.bias_lr_ratio"}


def test_the_share_of_bottleneck_adapters_is_part_of_what_is_recorded_where_it_is_given() -> None:
    recorded = [MethodConfig(name="bottleneck", **given).record() for given in ({}, {"adapter_share": 0.1})]
    assert recorded[1] == recorded[0] | {"adapter_share": 0.1}
    assert "adapter_share" not in recorded[0], "runs from before keep their key"


def test_a_section_survives_being_written_out_and_read_again() -> None:
    config = swept({"train.learning_rate": "1e-5..1e-3:log", "method.lora_r": [8, 16]})
    assert with_settings(config, {"sweep": config.sweep.model_dump()}) == config


def test_every_exclusion_names_a_setting() -> None:
    for name in NOT_SWEPT:
        section, key = name.split(".")
        assert key in SECTIONS[section].model_fields


def test_the_command_line_says_what_is_missing() -> None:
    assert parameters_from_text(["a.b=1..2:log", "c=x=y"]) == {"a.b": "1..2:log", "c": "x=y"}
    with pytest.raises(ConfigError, match="does not say what to try"):
        parameters_from_text(["train.learning_rate"])


def test_without_optuna_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    check_optuna()
    monkeypatch.setattr("giong.workflow.trials.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        check_optuna()
    assert str(caught.value) == "A sweep needs Optuna, which is not installed. Install it: pip install 'giong[sweep]'."


# From Python and from the command line


def test_python_and_the_command_line_can_say_all_that_giong_yaml_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, told = init(tmp_path / "voice"), []

    def run_story(root: Path, steps: list[str], emit: Any, **given: Any) -> None:
        told.append((steps, given))
        project.finish_step("sweep", "key", [], {"training": None, "sampling": None, "settings": {}, "yaml": ""})

    monkeypatch.setattr("giong.jobs.supervisor.run_story", run_story)
    given = {"num_trials": 3, "seed": 7, "pruning": False, "max_seconds": 60.0, "max_requests": 5}
    assert {"parameters", *given} == set(SweepConfig.model_fields)
    sweep(project, {"train.num_epochs": "1..4"}, **given, force=True, num_processes=2)  # type: ignore[arg-type]
    options = "--set train.num_epochs=1..4 --trials 3 --seed 7 --no-pruning --max-seconds 60 --max-requests 5 --force --num-processes 2"
    assert main(["sweep", "--project", str(project.root), *options.split()]) == 0
    assert told[0] == told[1]
    steps, passed_on = told[0]
    assert steps == ["sweep"]
    assert passed_on["num_processes"] == 2
    assert passed_on["settings"]["sweep"].items() >= given.items()


# What to try next


def new_search(folder: Path, seed: int = 0, present: dict[str, Any] | None = None, **parameters: Any) -> Search:
    spaces = {name.replace("__", "."): space for name, space in parameters.items()}
    spaces = spaces or {"train.learning_rate": "1e-5..1e-3:log", "method.lora_r": "1..100"}
    return Search(folder, swept(spaces).sweep.parameters, seed, present or {"train.learning_rate": 2e-4, "method.lora_r": 8})


def loss_of(settings: dict[str, Any]) -> float:
    return float(abs(np.log(settings["train.learning_rate"] / 1e-4)))


def go_on(search: Search, num_trials: int) -> list[dict[str, Any]]:
    """Trials whose loss is `loss_of`, one item each, every third one pruned."""
    while len(search.trials) < num_trials:
        settings = search.next_settings(str)
        assert settings is not None
        number, loss = len(search.trials), loss_of(settings)
        is_pruned = number % 3 == 2
        search.record(
            Trial(number, settings, "pruned", "run", 1.0, reports={25: loss})
            if is_pruned
            else Trial(number, settings, "finished", "run", 1.0, [loss], [1.0], {25: loss, 50: loss})
        )
    return [trial.settings for trial in search.trials]


def test_a_killed_search_goes_on_to_the_same_settings(tmp_path: Path) -> None:
    whole = go_on(new_search(tmp_path / "whole"), 10)
    for cut in (0, 1, 4, 7, 9):
        go_on(new_search(tmp_path / f"cut{cut}"), cut)
        with (tmp_path / f"cut{cut}" / "trials.jsonl").open("a") as journal:
            journal.write('{"number": 99, "settings": {"train.lea')
        again = new_search(tmp_path / f"cut{cut}", present={"train.learning_rate": 9e-4, "method.lora_r": 99})
        assert len(again.trials) == cut
        assert go_on(again, 10) == whole


def test_the_seed_decides_and_the_first_trial_is_the_settings_as_they_are(tmp_path: Path) -> None:
    first, second = (go_on(new_search(tmp_path / str(seed), seed), 6) for seed in (0, 1))
    assert first[0] == second[0] == {"train.learning_rate": 2e-4, "method.lora_r": 8}
    assert all(ours != theirs for ours, theirs in zip(first[1:], second[1:]))


def test_settings_lie_in_the_space_and_are_short(tmp_path: Path) -> None:
    search = new_search(tmp_path)
    for settings in go_on(search, 12)[1:]:
        assert 1e-5 <= settings["train.learning_rate"] <= 1e-3
        assert 1 <= settings["method.lora_r"] <= 100
        assert settings["train.learning_rate"] == float(f"{settings['train.learning_rate']:.3g}")
        assert isinstance(settings["method.lora_r"], int)


def test_the_search_learns(tmp_path: Path) -> None:
    losses = [loss_of(settings) for settings in go_on(new_search(tmp_path), 40)]
    # Chance alone would leave them alike: over this range its mean is log(10) / 2.
    assert np.mean(losses[-15:]) < 0.6 * np.log(10) / 2


def test_nothing_is_tried_twice_and_the_space_ends(tmp_path: Path) -> None:
    present = {"method.lora_r": 8, "train.schedule": "cosine"}
    search = new_search(tmp_path, present=present, method__lora_r=[4, 8, 16], train__schedule=["cosine", "linear"])
    tried = []
    while (settings := search.next_settings(str)) is not None:
        tried.append((settings["method.lora_r"], settings["train.schedule"]))
        search.record(Trial(len(search.trials), settings, "finished", "run", 1.0, [1.0], [1.0]))
    assert len(set(tried)) == len(tried) == 6


def test_a_trial_behind_the_median_is_bad(tmp_path: Path) -> None:
    search = new_search(tmp_path)
    for number, loss in enumerate([1.0, 2.0, 3.0]):
        search.record(Trial(number, search.present, "finished", "run", 1.0, [loss], [1.0], {25: loss + 1, 50: loss}))
    assert not search.is_bad({25: 100.0}), "three finished trials are too few"
    search.record(Trial(3, search.present, "finished", "run", 1.0, [4.0], [1.0], {25: 5.0, 50: 4.0}))
    # The median at a quarter of the way is 3.5, at half of it 2.5; the best point so far counts.
    assert not search.is_bad({25: 3.4})
    assert search.is_bad({25: 3.6})
    assert not search.is_bad({25: 3.4, 50: 2.4})
    assert search.is_bad({25: 3.4, 50: 2.6})
    assert search.is_bad({25: float("nan")})


def test_a_pruned_trial_reaches_another_process_whole() -> None:
    pruned = pickle.loads(pickle.dumps(TrialPruned(25, 3.5)))
    assert (type(pruned), pruned.percent, pruned.value, str(pruned)) == (TrialPruned, 25, 3.5, "stopped at 25 %")


def test_a_search_without_a_finished_trial_says_so(tmp_path: Path) -> None:
    search = new_search(tmp_path)
    search.record(Trial(0, search.present, "failed", "run", 1.0))
    with pytest.raises(StoryError, match="None of 1 trials came to its end"):
        search_result(search, "nats per token", ["a"], "trials")


def test_the_result_names_the_winner_and_the_luck(tmp_path: Path) -> None:
    search, documents = new_search(tmp_path), ["a", "a", "b", "c"]
    for number, losses in enumerate([[4.0, 4.0, 4.0, 4.0], [], [2.0, 2.0, 6.0, 3.0], [4.0, 3.0, 3.0, 9.0]]):
        state = "finished" if losses else "pruned"
        weights = [1.0, 1.0, 2.0, 1.0] if losses else []
        search.record(Trial(number, {**search.present, "method.lora_r": number + 1}, state, f"run{number}", 1.0, losses, weights))  # type: ignore[arg-type]
    result = search_result(search, "nats per token", documents, "trials")
    assert result["best"]["winner"] == 2
    assert result["run"] == "run2"
    assert result["settings"]["method.lora_r"] == 3
    assert result["best"]["value"]["point"] == pytest.approx(13 / 5)
    assert result["best"]["gain"]["point"] == pytest.approx(16 / 5 - 13 / 5)
    assert "best of 4 trials (3 finished, 1 stopped early, 0 failed)" in result["note"]
    assert "expected to be luck of the choice" in result["note"]
    assert "rough" in result["note"]


# How optimistic the best is


def test_optimism_of_two_trials_by_hand() -> None:
    """Each is better on one of two documents. Resamples with one document choose its better trial and measure it on the other."""
    best = best_of(np.array([[1.0, 3.0], [3.0, 1.0]]), np.ones(2), ["a", "b"], 0, num_bootstrap=20_000)
    assert (best.winner, best.value.point, best.gain.point, best.num_documents) == (0, 2.0, 0.0, 2)
    # Left out: trial 0 chosen on a loses nothing to itself on b, trial 1 chosen on b is 2 worse on a; the mean is 1.
    assert best.optimism == pytest.approx(1.0, abs=0.03)
    assert best.corrected_gain.point == pytest.approx(-1.0, abs=0.03)


def test_weights_are_tokens_and_documents_are_drawn_whole() -> None:
    losses = np.array([[2.0, 4.0, 9.0], [1.0, 2.0, 9.0]])
    best = best_of(losses, np.array([1.0, 1.0, 2.0]), ["a", "a", "b"], 0)
    assert best.value.point == pytest.approx(12 / 4)
    # A resample holds a alone (1.5 nats per token), b alone (4.5) or both.
    assert (best.value.low, best.value.high) == (pytest.approx(1.5), pytest.approx(4.5))
    assert best.num_documents == 2
    assert best_of(losses, np.array([1.0, 1.0, 2.0]), ["a", "a", "a"], 0).num_documents == 3


def test_optimism_is_what_luck_gives_and_leaves_a_real_lead_alone() -> None:
    gains, optimism = [], []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        losses = generator.normal(0, 1, 12) + generator.normal(0, 0.3, (10, 12))
        best = best_of(losses, np.ones(12), [str(document) for document in range(12)], 0, num_bootstrap=300)
        gains.append(best.gain.point)
        optimism.append(best.optimism)
    # Ten equal trials: the whole gain is luck.
    assert np.mean(gains) > 0.1
    assert np.mean(optimism) == pytest.approx(np.mean(gains), rel=0.25)
    losses[3] -= 5
    best = best_of(losses, np.ones(12), [str(document) for document in range(12)], 0)
    assert best.winner == 3
    assert best.optimism < 0.02
    assert best.corrected_gain.low > 4


def test_what_cannot_be_estimated_is_not_a_number() -> None:
    best = best_of(np.array([[2.0], [1.0]]), np.ones(1), ["a"], 0)
    assert (best.winner, best.gain.point) == (1, 1.0)
    assert np.isnan(best.optimism)
    assert best_of(np.array([[2.0, 3.0]]), np.ones(2), ["a", "b"]).optimism == 0.0


# Writing the winner into giong.yaml

SETTINGS = {"train.learning_rate": 2.5e-05, "method.lora_r": 16}
TEXTS = {
    "replaced": "# mine\nmethod:\n  lora_r: 8   # small\ntrain:\n  # keep this\n  learning_rate: 1e-3\n  num_epochs: 2\nname: a\n",
    "added": "name: a  # why\ntrain:\n    # four spaces\n    num_epochs: 2\nmethod: {name: lora}\n",
    "new sections": "name: a # no line end",
    "commented out": "train:\n#  learning_rate: 1.0e-3\nmethod: {}\n",
    "other line ends": "name: a\r\ntrain:\r\n  num_epochs: 2\r\n",
    "empty": "",
    "last line": "method:\n  lora_r: 8\ntrain:",
}


@pytest.mark.parametrize("case", TEXTS)
def test_settings_are_written_and_everything_else_stays(case: str) -> None:
    text = TEXTS[case]
    changed = with_written(text, SETTINGS)
    before, after = yaml.safe_load(text) or {}, yaml.safe_load(changed)
    for section, key, value in (("train", "learning_rate", 2.5e-05), ("method", "lora_r", 16)):
        before[section] = {**(before.get(section) or {}), key: value}
    assert after == before
    comments = [line.partition("#")[2] for line in text.splitlines() if "#" in line]
    assert [line.partition("#")[2] for line in changed.splitlines() if "#" in line] == comments
    assert ("\r\n" in changed) == ("\r\n" in text)
    assert "\n" not in changed.replace("\r\n", "") or "\r\n" not in text
    assert with_written(changed, SETTINGS) == changed
    config = parse(yaml.safe_load(changed))
    assert (config.train.learning_rate, config.method.lora_r) == (2.5e-05, 16)


def test_a_text_that_cannot_be_edited_safely_gives_the_lines() -> None:
    shared = "method: &m\n  lora_r: 8\nother: *m\ntrain:\n  num_epochs: &n 2\n"
    with pytest.raises(ConfigError, match="learning_rate: 2.5e-05") as caught:
        with_written(shared, SETTINGS, place="giong.yaml")
    assert caught.value.place == "giong.yaml"
    assert yaml.safe_load(settings_yaml(SETTINGS)) == {"train": {"learning_rate": 2.5e-05}, "method": {"lora_r": 16}}
