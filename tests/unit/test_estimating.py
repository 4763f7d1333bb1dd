"""What a run is estimated by: the device that it will compute on, who shares it, and what its settings change."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from giong.config import MethodConfig, ProjectConfig, parse
from giong.config.training import OF_THE_DAY
from giong.engine.memory import ActivationPlan
from giong.errors import ConfigError
from giong.methods import sparse
from giong.models.rows import Row, RowReport
from giong.sizing.estimate import Estimate, PlannedRun, estimate_training
from giong.sizing.flops import scoring_after_probe, slowdown_after_probe
from giong.sizing.hardware import Machine, gpu_like
from giong.sizing.memory import RUNTIME_BYTES, training_memory
from giong.sizing.shapes import linear_layers, num_trainable_parameters, shape_from_config
from giong.workflow import check_beforehand, estimating, replay, sizing, sweeping, training, workload
from giong.workflow.story import Lengths
from giong.workspace import write_json

SHAPE = shape_from_config({
    "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True,
})  # fmt: skip
LORA = {"name": "lora", "lora_r": 16, "lora_alpha": 32.0, "lora_dropout": 0.0}

WRITING, TRAINING = 50.0, 1000.0
"""Tokens a second of the probe."""


def row_of(num_tokens: int, name: str = "", **others: Any) -> Row:
    """The second half of it carries loss."""
    weights = (np.arange(num_tokens) >= num_tokens // 2).astype(np.float32)
    return Row(np.zeros(num_tokens, dtype=np.int64), weights, name, **others)


ROWS = [row_of(length, f"r{number}") for number, length in enumerate([900, 648, 226, 226, *[500] * 76])]
"""40,000 tokens; the longest three fill a pack of 2,048."""
NUM_TOKENS = 40_000
HOST = Machine(8, "a CPU", frozenset({"avx2"}), 2.5e9, 64 * 10**9, 60 * 10**9, None, 10**12)


class Told(SimpleNamespace):
    """Stands for an object of which only these attributes are asked."""

    __hash__ = object.__hash__


def story_of(config: ProjectConfig, folder: Path, num_processes: int = 1) -> Any:
    """What an estimate asks of a story."""
    processes = SimpleNamespace(size=num_processes, num_on_machine=num_processes) if num_processes > 1 else None
    return Told(
        config=config, processes=processes, met_lengths=Lengths(), project=SimpleNamespace(root=folder, list_runs=lambda: sorted(folder.glob("rows-*"))),
        local=SimpleNamespace(loaded=SimpleNamespace(shape=SHAPE, max_seq_length=1024)),
        examples_of=lambda side: [SimpleNamespace(id=row.name) for row in ROWS],
    )  # fmt: skip


def run_of(config: ProjectConfig) -> Any:
    train = config.train.model_copy(update={"num_epochs": config.train.num_epochs or 1.0, "learning_rate": 1e-4})
    settings = {
        "method": config.method.record(), "objective": config.objective.record(), "train": train.model_dump(exclude=set(OF_THE_DAY)),
        "dtype": "bfloat16",
    }  # fmt: skip
    return SimpleNamespace(
        examples=[], record={"settings": settings, "reasons": {}, "model_identity": "a model", "machine": {"cpu": "a CPU"}}
    )


@pytest.fixture(autouse=True)
def probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the probe had measured 1,000 tokens a second on a CPU; and every run is on ROWS."""
    speeds = {"train_tokens_per_second": TRAINING, "lane_speedup": 1.5, "write_tokens_per_second": WRITING}
    # One pass at a time, whatever this machine has, but where a test is about more.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(estimating, "probe", lambda story: {"dtype": "bfloat16", **speeds})
    monkeypatch.setattr(estimating, "machine_of", lambda device: HOST)
    for module in (training, sweeping):
        monkeypatch.setattr(module, "rows_of", lambda story, examples: (ROWS, RowReport()))


def estimated(folder: Path, num_processes: int = 1, rows: list[Row] = ROWS, **settings: Any) -> Estimate:
    config = parse({"model": {"device": "cpu"}, "method": LORA, **settings})
    return estimating.estimate_run(story_of(config, folder, num_processes), run_of(config), rows)


def planned(folder: Path, rows: list[Row] = ROWS, **settings: Any) -> PlannedRun:
    config = parse({"model": {"device": "cpu"}, "method": LORA, **settings})
    return estimating.planned_run(story_of(config, folder), run_of(config), rows)


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
    on_gpu = estimating.estimate_run(story, run, ROWS)
    num_lora = num_trainable_parameters(SHAPE, MethodConfig(**LORA))
    assert (
        on_gpu.peak_memory_bytes
        == training_memory(SHAPE, MethodConfig(**LORA), num_lora, 2048, "bfloat16", max_row_tokens=900, device="gpu").total_bytes
    )
    assert on_gpu.peak_memory_bytes != on_cpu.peak_memory_bytes
    rows = sizing.backends(story, run)
    assert (rows[0]["peak_memory_bytes"], rows[0]["fits"]) == (on_gpu.peak_memory_bytes, True)
    assert asked == ["what cuda stands for"] * 2


def finish(folder: Path, config: ProjectConfig, num_processes: int, tokens_per_second: float) -> None:
    """As if a run of the same recipe had ended there."""
    write_json(folder / "rows-1" / "run.json", run_of(config).record)
    results = {
        "num_processes": num_processes, "num_tokens": 10**6, "tokens_per_second": tokens_per_second,
        "max_tokens_per_pack": config.train.max_tokens_per_pack,
    }  # fmt: skip
    write_json(folder / "rows-1" / "results.json", results)


def test_the_speed_of_a_finished_run_is_that_of_all_its_processes(tmp_path: Path) -> None:
    config = parse({"model": {"device": "cpu"}, "method": LORA})
    alone, four = estimated(tmp_path), estimated(tmp_path, 4)
    assert 3 < alone.seconds / four.seconds < 4
    finish(tmp_path, config, num_processes=4, tokens_per_second=2500.0)
    assert estimated(tmp_path, 4).seconds == pytest.approx(NUM_TOKENS / 2500)
    # It says nothing about one process.
    assert estimated(tmp_path).seconds == alone.seconds


def test_packs_of_the_day_are_estimated_and_those_of_another_size_had_another_speed(tmp_path: Path) -> None:
    small = {"max_tokens_per_pack": 1024}
    plain, packed = estimated(tmp_path), estimated(tmp_path, train=small)
    assert packed.peak_memory_bytes < plain.peak_memory_bytes
    finish(tmp_path, parse({"model": {"device": "cpu"}, "method": LORA, "train": small}), num_processes=1, tokens_per_second=40.0)
    assert estimated(tmp_path).seconds == plain.seconds
    assert estimated(tmp_path, train=small).seconds == pytest.approx(NUM_TOKENS / 40)


def test_what_is_announced_before_a_run_is_the_estimate(tmp_path: Path) -> None:
    """These seconds also decide whether it pays to compile."""
    config = parse({"model": {"device": "cpu"}, "method": LORA, "train": {"num_epochs": 1}})
    finish(tmp_path, config, num_processes=4, tokens_per_second=40.0)
    said: list[str] = []
    story, run = story_of(config, tmp_path, 4), run_of(config)
    story.notice = lambda stage, message: said.append(message)
    estimate = estimating.announce_run(story, run, estimating.resolved_of(story, run), ROWS, "train")
    assert estimate.seconds - estimate.write_seconds == pytest.approx(1000.0)
    assert "about 16 min 40 s" in said[-1] and "in each of 4 processes" in said[-1]


def test_the_announcement_of_pilots_counts_all_processes(tmp_path: Path) -> None:
    config = parse({"model": {"device": "cpu"}, "method": LORA, "train": {"num_epochs": 1}})
    finish(tmp_path, config, num_processes=4, tokens_per_second=40.0)
    said: list[str] = []
    story, run = story_of(config, tmp_path, 4), run_of(config)
    run.is_finished = False
    story.notice = lambda stage, message: said.append(message)
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
    fits = [sizing.backends(story_of(config, tmp_path, num), run_of(config))[0]["fits"] for num in (1, 4, 16)]
    assert fits == [True, True, False]


def test_longest_row_optimizer_and_checkpointing_reach_the_estimate(tmp_path: Path) -> None:
    plain = estimated(tmp_path, method={"name": "full"}, train={"activation_checkpointing": "none"})
    muon = estimated(tmp_path, method={"name": "full"}, train={"activation_checkpointing": "none", "optimizer": "muon"})
    again = estimated(tmp_path, method={"name": "full"}, train={"activation_checkpointing": "all"})
    # 1.3 of the 1.5 billion weights are in the layers' matrices; each has one number of optimizer state less.
    assert plain.needed_memory_bytes - muon.needed_memory_bytes == pytest.approx(4 * 1.31e9, rel=0.01)
    assert (plain.num_checkpointed_layers, again.num_checkpointed_layers) == (0, 28)
    assert again.needed_memory_bytes < plain.needed_memory_bytes and again.seconds > plain.seconds
    made = planned(tmp_path, train={"activation_offload": True})
    assert (made.max_row_tokens, made.num_pack_rows, made.activation_checkpointing, made.activation_offload) == (900, 3, "auto", True)


def test_layers_computed_again_are_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimating, "machine_of", lambda device: replace(HOST, available_memory_bytes=7 * 10**9))
    config = parse({"model": {"device": "cpu"}, "method": LORA})
    said: list[str] = []
    story, run = story_of(config, tmp_path), run_of(config)
    story.notice = lambda stage, message: said.append(message)
    estimating.announce_run(story, run, estimating.resolved_of(story, run), ROWS, "train")
    number = estimated(tmp_path).num_checkpointed_layers
    assert 0 < number < 28
    assert f"GiB with {number} of 28 layers computed again, " in said[-1]


def test_a_sweep_is_announced_for_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trials of 40,000 tokens at 40 a second, all four processes together; one of them scores 3,000 tokens, in a third of their time."""
    config = parse({"model": {"device": "cpu"}, "method": LORA, "train": {"num_epochs": 1}, "sweep": {"num_trials": 2, "pruning": False}})
    finish(tmp_path, config, num_processes=4, tokens_per_second=40.0)
    said: list[str] = []
    story, run = story_of(config, tmp_path, 4), run_of(config)
    story.notice = lambda stage, message: said.append(message)
    monkeypatch.setattr(sweeping, "plan_run", lambda story, share: run)
    monkeypatch.setattr(sweeping, "rows_of", lambda story, examples: ([], RowReport(num_rows=10, num_tokens=3000)))
    sweeping._announce_training(story, Told(trials=[], parameters={}), [])
    # 1,000 s of training and 1,000 tokens' time at 10 tokens a second.
    assert said == ["2 trials, about 36 min 40 s"]


# ---- what an objective does beside learning from rows --------------------------------------------------------------------

GRPO = {"name": "grpo", "num_generations": 4, "num_updates": 2, "max_new_tokens": 300}
ANSWERED = [(length // 2, min(length // 2, 300)) for length in map(len, ROWS)]
"""Tokens of each request, and of an answer to it that is as long as the author's where the limit allows that."""
DRAWN, ASKED = (8 * sum(part) for part in ([answer for _, answer in ANSWERED], map(sum, ANSWERED)))
"""Of answers, and of requests with their answers: four to each request in each of two epochs."""


def test_a_run_that_draws_takes_the_time_of_drawing_scoring_and_every_update(tmp_path: Path) -> None:
    with_tools = row_of(700, "a conversation that is not asked")
    settings = {"objective": GRPO, "train": {"num_epochs": 2}}
    made = planned(tmp_path, [*ROWS, with_tools], **settings)
    # The reference and, for two updates, the model that drew.
    assert (made.num_written_tokens, made.num_scored_tokens, made.num_tokens) == (DRAWN, 2 * ASKED, 2 * ASKED)
    assert (made.row_tokens, made.num_steps) == (ASKED // 640, 2 * 21)
    assert made.loss_share == pytest.approx(DRAWN / ASKED)
    found = estimated(tmp_path, rows=[*ROWS, with_tools], **settings)
    shape, method, num_trainable, row_tokens, share = SHAPE, made.method, made.num_trainable, made.row_tokens, made.loss_share
    trained, scored = (cost(shape, method, num_trainable, row_tokens, share) for cost in (slowdown_after_probe, scoring_after_probe))
    updates = made.update_bytes / 20e9
    assert found.write_seconds == DRAWN / WRITING
    assert found.seconds == pytest.approx(2 * ASKED * (trained + scored) / TRAINING + DRAWN / WRITING + updates, rel=1e-2)
    # Several times what the author's rows alone would take.
    assert found.seconds > 8 * estimated(tmp_path, train={"num_epochs": 2}).seconds
    # One process draws and scores for all.
    four = estimated(tmp_path, 4, rows=[*ROWS, with_tools], **settings)
    assert four.seconds > DRAWN / WRITING + 2 * ASKED * scored / TRAINING
    # The speed of a finished run is one over what was drawn, with all that its steps do.
    config = parse({"model": {"device": "cpu"}, "method": LORA, **settings})
    finish(tmp_path, config, num_processes=1, tokens_per_second=100.0)
    finished = estimated(tmp_path, **settings)
    assert (finished.seconds, finished.write_seconds) == (pytest.approx(2 * ASKED / 100), 0.0)


def test_answers_are_expected_within_the_limit_of_the_run_and_memory_suffices_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"objective": {"name": "rloo", "num_generations": 2}, "train": {"num_epochs": 1, "max_tokens_per_pack": 700}}
    monkeypatch.setattr("giong.workflow.arms.answer_tokens", lambda story: 100)
    short = planned(tmp_path, **settings)
    assert short.num_written_tokens == 2 * 100 * 80
    monkeypatch.setattr("giong.workflow.arms.answer_tokens", lambda story: 400)
    made = planned(tmp_path, **settings)
    assert made.num_written_tokens == 2 * sum(min(length // 2, 400) for length in map(len, ROWS))
    # The longest request with an answer to the limit, where the author's own pack has 700 tokens; the context is 1,024.
    assert (made.max_row_tokens, made.max_tokens_per_pack, made.num_pack_rows) == (450 + 400, 850, 1)
    monkeypatch.setattr("giong.workflow.arms.answer_tokens", lambda story: 4000)
    assert planned(tmp_path, **settings).max_row_tokens == 1024


def test_distillation_draws_in_a_share_of_its_steps(tmp_path: Path) -> None:
    objective = {"name": "distill", "teacher": "elsewhere", "on_policy_share": 0.25, "max_new_tokens": 300}
    made = planned(tmp_path, objective=objective, train={"num_epochs": 2})
    assert (made.num_written_tokens, made.num_scored_tokens) == (round(DRAWN / 16), 0)
    assert made.num_tokens == pytest.approx(2 * (0.75 * NUM_TOKENS + 0.25 * ASKED / 8), abs=1)
    assert planned(tmp_path, objective=objective | {"on_policy_share": 0}).num_written_tokens == 0


def test_what_is_taken_for_granted_of_drawn_answers_is_said(tmp_path: Path) -> None:
    config = parse({"model": {"device": "cpu"}, "method": LORA, "objective": GRPO, "train": {"num_epochs": 2}})
    said: list[str] = []
    story, run = story_of(config, tmp_path), run_of(config)
    story.notice = lambda stage, message: said.append(message)
    estimate = estimating.announce_run(story, run, estimating.resolved_of(story, run), ROWS, "train")
    mean = DRAWN / 8 / 80
    assert said[-2] == (
        f"drawn answers are taken to be as long as the author's, {mean:.0f} tokens in the mean of at most 300; "
        "the time for their rewards is left out"
    )
    assert "of it to draw answers)" in said[-1]
    # What compiling could gain from.
    assert estimate.write_seconds == pytest.approx(DRAWN / WRITING)
    assert estimate.seconds == pytest.approx(estimated(tmp_path, objective=GRPO, train={"num_epochs": 2}).seconds)
    finish(tmp_path, config, num_processes=1, tokens_per_second=100.0)
    estimating.announce_run(story, run, estimating.resolved_of(story, run), ROWS, "train")
    assert said[-2].endswith("of at most 300")


COMPARED = {"data": {"preferences": "pairs.jsonl"}}
LONGEST_GROUPS = [1500, 1300, 1100, 1000, 900, 800, 700, 600]


def paired(lengths: list[int]) -> list[Row]:
    """Two rows in each group, a third and two thirds of its tokens; the long ones last."""
    parts = [(number, part) for number, length in enumerate(sorted(lengths)) for part in (length // 3, length - length // 3)]
    return [row_of(part, extras={"sign_R": 1.0}, group=number) for number, part in parts]


def test_a_pair_is_one_row_of_a_step_and_one_pack(tmp_path: Path) -> None:
    rows = paired([*LONGEST_GROUPS, 2400, *[300] * 7])
    made = planned(tmp_path, rows, objective={"name": "simpo"}, train={"num_epochs": 3}, **COMPARED)
    # 16 pairs, 8 in a step; the longest one is longer than a pack of 2,048 tokens, and its longer row is not.
    assert made.num_steps == 6
    assert (made.max_tokens_per_pack, made.max_row_tokens, made.num_pack_rows) == (2400, 1600, 2)
    assert made.num_scored_tokens == 0


def test_rows_that_are_compared_take_the_memory_of_a_whole_step(tmp_path: Path) -> None:
    rows = paired([*LONGEST_GROUPS, *[300] * 8])
    made = planned(tmp_path, rows, objective={"name": "kto"}, **COMPARED)
    assert (made.max_tokens_per_pack, made.num_pack_rows) == (sum(LONGEST_GROUPS), 16)
    # A step may also be smaller than what a pack could hold.
    fewer = planned(tmp_path, rows, objective={"name": "dpo"}, train={"batch_rows": 1}, **COMPARED)
    assert fewer.max_tokens_per_pack == 1500


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_the_reference_reads_every_row_once(tmp_path: Path, name: str) -> None:
    rows = paired([500] * 80)
    with_it, without = (estimated(tmp_path, rows=rows, objective={"name": each}, **COMPARED) for each in (name, "simpo"))
    made = planned(tmp_path, rows, objective={"name": name}, **COMPARED)
    scored = NUM_TOKENS * scoring_after_probe(SHAPE, made.method, made.num_trainable, made.row_tokens, made.loss_share) / TRAINING
    assert made.num_scored_tokens == NUM_TOKENS
    assert with_it.seconds - without.seconds == pytest.approx(scored, rel=1e-6)
    # It lies before the steps, whose speed a finished run knows.
    settings = {"model": {"device": "cpu"}, "method": LORA, "objective": {"name": name}, **COMPARED}
    finish(tmp_path, parse(settings), num_processes=1, tokens_per_second=100.0)
    trained = slowdown_after_probe(SHAPE, made.method, made.num_trainable, made.row_tokens, made.loss_share)
    known = estimated(tmp_path, rows=rows, objective={"name": name}, **COMPARED).seconds
    assert known == pytest.approx(NUM_TOKENS / 100 * (1 + scored * TRAINING / NUM_TOKENS / trained))


def test_the_divergence_from_the_base_takes_half_as_long_again_and_a_copy_of_what_moves(tmp_path: Path) -> None:
    plain, held = (estimated(tmp_path, train={"kl_weight": weight}) for weight in (0.0, 0.2))
    assert 1.4 < held.seconds / plain.seconds < 1.8
    num_lora = num_trainable_parameters(SHAPE, MethodConfig(**LORA))
    assert held.needed_memory_bytes - plain.needed_memory_bytes > 2 * num_lora
    full = {"method": {"name": "full"}, "train": {"activation_checkpointing": "none"}}
    pulled = estimated(tmp_path, **(full | {"train": full["train"] | {"l2_to_base": 1.0}}))
    assert pulled.needed_memory_bytes - estimated(tmp_path, **full).needed_memory_bytes == 2 * SHAPE.num_parameters
    # What scores drawn answers is a copy too, and the pull keeps its own.
    online = [planned(tmp_path, objective=GRPO, train={"kl_weight": weight}).num_anchors for weight in (0.0, 0.2)]
    assert (online, planned(tmp_path).num_anchors) == ([1, 2], 0)


def test_replayed_text_counts_wherever_a_run_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"num_epochs": 1, "replay_share": 0.2}
    config = parse({"model": {"device": "cpu"}, "method": LORA, "train": settings, "sweep": {"num_trials": 2, "pruning": False}})
    finish(tmp_path, config, num_processes=1, tokens_per_second=40.0)
    monkeypatch.setattr(training, "replay_rows", lambda story, rows: [row_of(1000)] * 8)
    monkeypatch.setattr(sweeping, "rows_of", lambda story, examples: ([], RowReport()))
    story, run, said = story_of(config, tmp_path), run_of(config), []
    run.is_finished = False
    story.notice = lambda stage, message: said.append(message)
    sizing._announce_pilots(story, [(story, run)])
    monkeypatch.setattr(sweeping, "plan_run", lambda story, share: run)
    sweeping._announce_training(story, Told(trials=[], parameters={}), [])
    # 48,000 tokens at 40 a second, and two trials.
    assert said == ["1 training on slices, about 20 min 00 s together, no cost", "2 trials, about 40 min 00 s"]
    remote = [row for row in sizing.backends(story, run) if row["kind"] == "remote" and row["low_usd"]]
    monkeypatch.setattr(training, "replay_rows", lambda story, rows: [])
    without = [row for row in sizing.backends(story, run) if row["kind"] == "remote" and row["low_usd"]]
    assert [row["low_usd"] for row in remote] == [pytest.approx(1.2 * row["low_usd"]) for row in without]


def test_too_little_text_for_replay_is_said(tmp_path: Path) -> None:
    story, said = story_of(parse({"train": {"replay_share": 0.5}}), tmp_path), []
    story.notice = lambda stage, message: said.append(message)
    # 5 tokens with loss of the author's.
    replay.say_shortfall(story, [row_of(10)], [row_of(10)])
    assert said == []
    replay.say_shortfall(story, [row_of(10)], [row_of(4)])
    assert said[0].startswith("the text for replay suffices for a share of 0.29 instead of 0.5")


def test_the_pack_with_most_virtual_tokens_is_the_one_that_counts(tmp_path: Path) -> None:
    """One long row among short ones: of the packs that a step can make, the one without it has most rows."""
    rows = [row_of(900), *[row_of(100) for _ in range(79)]]
    prompt = {"method": {"name": "prompt_tuning", "num_virtual_tokens": 20}, "train": {"batch_rows": 32}}
    made = planned(tmp_path, rows, **prompt)
    assert (made.max_tokens_per_pack, made.num_pack_rows, made.max_row_tokens) == (2000, 20, 100)
    lengths = {"num_pack_lengths": made.num_pack_lengths, "num_row_lengths": made.num_row_lengths}
    memory = training_memory(SHAPE, made.method, made.num_trainable, 2000, "bfloat16", max_row_tokens=100, num_pack_rows=20, **lengths)
    assert made.memory("bfloat16", device="cpu") == memory
    # No step has more rows than its batch.
    few = planned(tmp_path, rows, **(prompt | {"train": {"batch_rows": 8}}))
    assert (few.max_tokens_per_pack, few.num_pack_rows) == (1600, 8)


def test_what_this_process_has_already_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries of earlier steps lie in it too; where the system does not tell, or tells less, it is what libraries alone take."""
    weights, found = SHAPE.num_parameters * 2, []
    for resident in (weights + 3 * 10**9, weights + 10**6, None):
        monkeypatch.setattr(estimating, "resident_bytes", lambda resident=resident: resident)
        found.append(planned(tmp_path).runtime_bytes)
    assert found == [3 * 10**9, RUNTIME_BYTES, RUNTIME_BYTES]


def test_the_lengths_of_packs_and_rows_are_counted(tmp_path: Path) -> None:
    """As they are rounded, to 32 up to 1,024 and to 64 above; `batch_rows` of them are a step."""
    alike = [row_of(length) for length in (500, 505, 510, 512) * 4]
    settings = {"train": {"batch_rows": 4, "max_tokens_per_pack": 600}}
    assert [getattr(planned(tmp_path, alike, **settings), name) for name in ("num_pack_lengths", "num_row_lengths")] == [1, 1]
    unlike = [row_of(length) for length in (100, 110, 200, 300, 1050)]
    one_each = {"train": {"batch_rows": 1, "max_tokens_per_pack": 600}}
    assert [getattr(planned(tmp_path, unlike, **one_each), name) for name in ("num_pack_lengths", "num_row_lengths")] == [4, 4]
    together = planned(tmp_path, unlike, train={"batch_rows": 8, "max_tokens_per_pack": 4096})
    assert (together.num_pack_lengths, together.num_row_lengths) == (1, 4)
    # What an earlier run has met lies in the process's memory already.
    config = parse({"model": {"device": "cpu"}, "method": LORA, **one_each})
    story = story_of(config, tmp_path)
    story.met_lengths = Lengths(frozenset({128, 1088}), frozenset({128}))
    made = estimating.planned_run(story, run_of(config), unlike)
    assert (made.num_pack_lengths, made.num_row_lengths) == (2, 3)


def test_choosing_single_weights_is_part_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows as `sparse_rows` go forward and backward once for each part of the matrices whose scores are held together."""
    matrices = sum(linear.num_weights for linear in linear_layers(SHAPE)) * SHAPE.num_hidden_layers
    rows = [row_of(100) for _ in range(16)]
    monkeypatch.setattr(sparse, "SCORES_AT_ONCE", matrices)
    whole = planned(tmp_path, rows, method={"name": "sparse", "sparse_rows": 8})
    assert whole.num_choosing_tokens == 8 * 100
    monkeypatch.setattr(sparse, "SCORES_AT_ONCE", matrices // 4)
    parted = planned(tmp_path, rows, method={"name": "sparse", "sparse_rows": 8})
    assert parted.num_choosing_tokens >= 4 * 800
    by_size = planned(tmp_path, rows, method={"name": "sparse", "sparse_score": "magnitude"})
    assert by_size.num_choosing_tokens == planned(tmp_path, rows).num_choosing_tokens == 0
    none, some = (estimate_training(replace(whole, num_choosing_tokens=number), machine=HOST).seconds for number in (0, whole.num_tokens))
    assert some == pytest.approx(2 * none, rel=0.1)


def test_passes_side_by_side_are_faster_and_have_a_head_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row_of(1000) for _ in range(16)]

    def made(dropout: bool = False, **settings: Any) -> PlannedRun:
        config = parse({"model": {"device": "cpu"}, "method": LORA, "train": {"max_tokens_per_pack": 4096}} | settings)
        story = story_of(config, tmp_path)
        story.local.loaded.model = None
        monkeypatch.setattr(workload, "may_share", lambda model, training: training and not dropout)
        return estimating.planned_run(story, run_of(config), rows)

    alone = made()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    beside = made()
    assert (alone.num_lanes, beside.num_lanes, beside.lane_speedup) == (1, 2, 1.5)
    slow, fast = (estimate_training(run, machine=HOST) for run in (alone, beside))
    assert 1.49 < slow.seconds / fast.seconds < 1.51
    one, two = (run.memory("bfloat16", device="cpu") for run in (alone, beside))
    assert two.activations_bytes == one.activations_bytes and two.working_bytes >= one.working_bytes
    long, everything = {"train": {"max_tokens_per_pack": 1500}}, {"method": {"name": "full"}}
    held = {"train": {"max_tokens_per_pack": 4096, "kl_weight": 0.1}}
    compiled = {"train": {"max_tokens_per_pack": 4096, "compile": True}}
    single = {"method": {"name": "sparse"}}
    taught = {"objective": {"name": "distill", "teacher": "teacher"}}
    others = (long, everything, held, compiled, single, taught)
    assert [made(**settings).num_lanes for settings in others] == [1] * len(others)
    assert made(dropout=True).num_lanes == 1


# ---- what is judged by the likelihood of the author's answers ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "aim"), [("grpo", "drawn answers"), ("rloo", "drawn answers"), ("ppo", "drawn answers"), ("dpo", "pairs")]
)
def test_neither_a_sweep_nor_a_forecast_goes_by_a_likelihood_that_is_not_aimed_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, aim: str
) -> None:
    why = f"{name} learns from {aim}, and the likelihood of the author's answers does not tell how well"
    monkeypatch.setattr("giong.models.folder.check_model", lambda config: None)
    settings = {"objective": {"name": name}, **(COMPARED if name == "dpo" else {})}
    story, said = story_of(parse(settings), tmp_path), []
    with pytest.raises(ConfigError, match=f"A sweep has nothing to choose by: {why}"):
        check_beforehand(story, ["sweep"])
    story.notice = lambda stage, message: said.append((stage, message))
    sizing.size_opportunity(story)
    assert said == [("size", f"no forecast: {why}")]


def test_what_copies_the_author_is_swept_and_so_is_the_sampling_of_what_is_rewarded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("giong.models.folder.check_model", lambda config: None)
    temperature = {"parameters": {"sampling.temperature": [0.0, 0.7]}}
    for settings in ({}, {"objective": {"name": "pretrain"}}, {"objective": {"name": "grpo"}, "sweep": temperature}):
        story = story_of(parse(settings), tmp_path)
        story.check_examples = lambda: None
        check_beforehand(story, ["sweep"])


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
    trainable: Any = SimpleNamespace(model=SimpleNamespace(device=SimpleNamespace(type="cuda")), num_trainable=8001, parameters={})
    with training.computing(story, trainable, ROWS, estimating.resolved_of(story, run), "train", compiled=False, couples_rows=False):
        pass
    assert planned == [-(-8001 // num_shards)]
    assert estimating.planned_run(story, run, ROWS).num_shards == num_shards
