"""What a run is estimated by: the device that it will compute on, who shares it, and what its settings change."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from giong.config import MethodConfig, ProjectConfig, parse
from giong.engine.memory import ActivationPlan
from giong.models.rows import RowReport
from giong.sizing.estimate import Estimate
from giong.sizing.hardware import Machine, gpu_like
from giong.sizing.memory import training_memory
from giong.sizing.shapes import num_trainable_parameters, shape_from_config
from giong.workflow import estimating, sizing, sweeping, training
from giong.workspace import write_json

SHAPE = shape_from_config({
    "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True,
})  # fmt: skip
LORA = {"name": "lora", "lora_r": 16, "lora_alpha": 32.0, "lora_dropout": 0.0}
REPORT = RowReport(num_rows=80, num_tokens=80 * 500, num_loss_tokens=80 * 250, max_row_tokens=900)
HOST = Machine(8, "a CPU", frozenset({"avx2"}), 2.5e9, 64 * 10**9, 60 * 10**9, None, 10**12)


class Told(SimpleNamespace):
    """Stands for an object of which only these attributes are asked."""

    __hash__ = object.__hash__


def story_of(config: ProjectConfig, folder: Path, num_processes: int = 1) -> Any:
    """What an estimate asks of a story."""
    processes = SimpleNamespace(size=num_processes, num_on_machine=num_processes) if num_processes > 1 else None
    return Told(
        config=config, processes=processes, project=SimpleNamespace(root=folder, list_runs=lambda: sorted(folder.glob("rows-*"))),
        local=SimpleNamespace(loaded=SimpleNamespace(shape=SHAPE)),
    )  # fmt: skip


def run_of(config: ProjectConfig) -> Any:
    train = config.train.model_copy(update={"num_epochs": config.train.num_epochs or 1.0, "learning_rate": 1e-4})
    settings = {"method": config.method.record(), "train": train.model_dump(), "dtype": "bfloat16"}
    return SimpleNamespace(record={"settings": settings, "reasons": {}, "model_identity": "a model", "machine": {"cpu": "a CPU"}})


@pytest.fixture(autouse=True)
def probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the probe had measured 1,000 tokens a second on a CPU."""
    monkeypatch.setattr(estimating, "probe", lambda story: {"dtype": "bfloat16", "train_tokens_per_second": 1000.0})
    monkeypatch.setattr(estimating, "machine_of", lambda device: HOST)


def estimated(folder: Path, num_processes: int = 1, **settings: Any) -> Estimate:
    config = parse({"model": {"device": "cpu"}, "method": LORA, **settings})
    return estimating.estimate_run(story_of(config, folder, num_processes), run_of(config), REPORT)


def test_the_device_of_the_settings_is_the_one_that_is_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def machine_of(device: object) -> Machine:
        asked.append(device)
        return replace(HOST, gpu=gpu_like("NVIDIA H200", 140 * 10**9))

    on_cpu = estimated(tmp_path)
    monkeypatch.setattr(estimating, "resolve_device", lambda setting: f"what {setting} stands for")
    monkeypatch.setattr(estimating, "machine_of", machine_of)
    config = parse({"model": {"device": "cuda"}, "method": LORA})
    story, run = story_of(config, tmp_path), run_of(config)
    on_gpu = estimating.estimate_run(story, run, REPORT)
    num_lora = num_trainable_parameters(SHAPE, MethodConfig(**LORA))
    assert (
        on_gpu.peak_memory_bytes
        == training_memory(SHAPE, MethodConfig(**LORA), num_lora, 2048, "bfloat16", max_row_tokens=900, device="gpu").total_bytes
    )
    assert on_gpu.peak_memory_bytes != on_cpu.peak_memory_bytes
    rows = sizing.backends(story, run, REPORT)
    assert (rows[0]["peak_memory_bytes"], rows[0]["fits"]) == (on_gpu.peak_memory_bytes, True)
    assert asked == ["what cuda stands for"] * 2


def finish(folder: Path, config: ProjectConfig, num_processes: int, tokens_per_second: float) -> None:
    """As if a run of the same recipe had ended there."""
    write_json(folder / "rows-1" / "run.json", run_of(config).record)
    results = {"num_processes": num_processes, "num_tokens": 10**6, "tokens_per_second": tokens_per_second}
    write_json(folder / "rows-1" / "results.json", results)


def test_the_speed_of_a_finished_run_is_that_of_all_its_processes(tmp_path: Path) -> None:
    config = parse({"model": {"device": "cpu"}, "method": LORA})
    alone, four = estimated(tmp_path), estimated(tmp_path, 4)
    assert 3 < alone.seconds / four.seconds < 4
    finish(tmp_path, config, num_processes=4, tokens_per_second=2500.0)
    assert estimated(tmp_path, 4).seconds == pytest.approx(REPORT.num_tokens / 2500)
    # It says nothing about one process.
    assert estimated(tmp_path).seconds == alone.seconds


def test_what_is_announced_before_a_run_is_the_estimate(tmp_path: Path) -> None:
    """These seconds also decide whether it pays to compile."""
    config = parse({"model": {"device": "cpu"}, "method": LORA, "train": {"num_epochs": 1}})
    finish(tmp_path, config, num_processes=4, tokens_per_second=40.0)
    said: list[str] = []
    story, run = story_of(config, tmp_path, 4), run_of(config)
    story.notice = lambda stage, message: said.append(message)
    seconds = training._announce(story, run, estimating.resolved_of(run), REPORT, "train", num_replayed_tokens=0)
    assert seconds == pytest.approx(1000.0)
    assert "about 16 min 40 s" in said[-1] and "in each of 4 processes" in said[-1]


def test_the_announcement_of_pilots_counts_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse({"model": {"device": "cpu"}, "method": LORA, "train": {"num_epochs": 1}})
    finish(tmp_path, config, num_processes=4, tokens_per_second=40.0)
    said: list[str] = []
    story, run = story_of(config, tmp_path, 4), run_of(config)
    run.is_finished, run.examples = False, []
    story.notice = lambda stage, message: said.append(message)
    monkeypatch.setattr(sizing, "rows_of", lambda story, examples: ([], REPORT))
    sizing._announce_pilots(story, [(story, run), (story, run)])
    assert said[0].startswith("2 trainings on slices, about 33 min 20 s together")


def test_full_training_in_shards_says_the_memory_of_one_process(tmp_path: Path) -> None:
    full, kept = {"method": {"name": "full"}}, {"activation_checkpointing": "none"}
    alone, four = (estimated(tmp_path, num, **full, train=kept) for num in (1, 4))
    whole = estimated(tmp_path, 4, **full, train={**kept, "fsdp": False})
    # 18 bytes per parameter alone; in shards 16 / 4, and what is gathered.
    assert whole.needed_memory_bytes == alone.needed_memory_bytes
    assert alone.needed_memory_bytes - four.needed_memory_bytes > 11 * SHAPE.num_parameters
    assert estimated(tmp_path, 4).needed_memory_bytes == estimated(tmp_path).needed_memory_bytes


def test_processes_on_one_machine_share_its_memory(tmp_path: Path) -> None:
    """LoRA on 1.5B needs 8 GB, which 60 GB hold four times and not sixteen times."""
    config = parse({"model": {"device": "cpu"}, "method": LORA})
    fits = [sizing.backends(story_of(config, tmp_path, num), run_of(config), REPORT)[0]["fits"] for num in (1, 4, 16)]
    assert fits == [True, True, False]


def test_longest_row_optimizer_and_checkpointing_reach_the_estimate(tmp_path: Path) -> None:
    plain = estimated(tmp_path, method={"name": "full"}, train={"activation_checkpointing": "none"})
    muon = estimated(tmp_path, method={"name": "full"}, train={"activation_checkpointing": "none", "optimizer": "muon"})
    again = estimated(tmp_path, method={"name": "full"}, train={"activation_checkpointing": "all"})
    # 1.3 of the 1.5 billion weights are in the layers' matrices; each has one number of optimizer state less.
    assert plain.needed_memory_bytes - muon.needed_memory_bytes == pytest.approx(4 * 1.31e9, rel=0.01)
    assert (plain.num_checkpointed_layers, again.num_checkpointed_layers) == (0, 28)
    assert again.needed_memory_bytes < plain.needed_memory_bytes and again.seconds > plain.seconds
    config = parse({"model": {"device": "cpu"}, "method": LORA})
    planned = estimating.planned_run(story_of(config, tmp_path), run_of(config), REPORT)
    assert (planned.max_row_tokens, planned.activation_checkpointing) == (900, "auto")


def test_layers_computed_again_are_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimating, "machine_of", lambda device: replace(HOST, available_memory_bytes=7 * 10**9))
    config = parse({"model": {"device": "cpu"}, "method": LORA})
    said: list[str] = []
    story, run = story_of(config, tmp_path), run_of(config)
    story.notice = lambda stage, message: said.append(message)
    training._announce(story, run, estimating.resolved_of(run), REPORT, "train", num_replayed_tokens=0)
    number = estimated(tmp_path).num_checkpointed_layers
    assert 0 < number < 28
    assert f"GiB with {number} of 28 layers computed again, " in said[-1]


def test_a_sweep_is_announced_for_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trials of 40,000 tokens at 40 a second, all four processes together; one of them scores 3,000 tokens, in a third of their time."""
    config = parse({"model": {"device": "cpu"}, "method": LORA, "train": {"num_epochs": 1}, "sweep": {"num_trials": 2, "pruning": False}})
    finish(tmp_path, config, num_processes=4, tokens_per_second=40.0)
    said: list[str] = []
    story, run = story_of(config, tmp_path, 4), run_of(config)
    run.examples = ["what is trained on"]
    story.notice = lambda stage, message: said.append(message)
    monkeypatch.setattr(sweeping, "plan_run", lambda story, share: run)
    reports = {1: REPORT, 0: RowReport(num_rows=10, num_tokens=3000)}
    monkeypatch.setattr(sweeping, "rows_of", lambda story, examples: ([], reports[len(examples)]))
    sweeping._announce_training(story, Told(trials=[], parameters={}), [])
    # 1,000 s of training and 1,000 tokens' time at 10 tokens a second.
    assert said == ["2 trials, about 36 min 40 s"]


@pytest.mark.parametrize(
    ("settings", "num_processes", "num_shards"),
    [
        ({"method": {"name": "full"}}, 8, 8),
        ({"method": {"name": "full"}}, 1, 1),
        ({"method": {"name": "full"}, "train": {"fsdp": False}}, 8, 1),
        ({"method": LORA}, 8, 1),
    ],
)
def test_a_plan_and_an_estimate_count_the_optimizer_of_a_shard(
    settings: dict[str, Any], num_processes: int, num_shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it in each process would have everything computed again and sent away that fits well."""
    config = parse({"model": {"device": "cpu"}, **settings})
    story, run, planned = story_of(config, tmp_path, num_processes), run_of(config), []

    def plan(model: object, rows: object, **given: Any) -> ActivationPlan:
        planned.append(given["num_trainable"])
        return ActivationPlan(0, False, 0, "")

    for name, stand_in in {
        "plan_activations": plan, "free_memory_bytes": lambda device: 10**10, "elementwise_of_run": lambda model, **how: nullcontext(),
        "activation_memory": lambda model, plan: nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(training, name, stand_in)
    trainable: Any = SimpleNamespace(model=SimpleNamespace(device=SimpleNamespace(type="cuda")), num_trainable=8001)
    with training.computing(story, trainable, [], estimating.resolved_of(run), "train", compiled=False, couples_rows=False):
        pass
    assert planned == [-(-8001 // num_shards)]
    assert estimating.planned_run(story, run, REPORT).num_shards == num_shards
