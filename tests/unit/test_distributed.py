"""Two processes train like one: the same figures, the same weights, checkpoints that either takes up, and one sentence when one dies.

The runs are made by tests/two_processes.py, two gloo processes at a time; here they are compared with runs of one process.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp as fsdp
import two_processes
from two_processes import CHANGED, EXACT, FULL, NUM_STEPS, PLANTED, SAME, Case, Outcome, make, trained

from giong.engine import distributed, sharding
from giong.engine.checkpoint import list_checkpoints
from giong.engine.distributed import ALONE, Processes, connect, deal, is_lost
from giong.errors import ResourceError, TrainingError
from giong.models.rows import Row

FP32 = (2e-4, 2e-4, 1e-4)
TOLERANCES = {
    # Each addition may round otherwise, 1e-7 each, and six AdamW steps amplify that by gradient over its mean size.
    "lora": FP32, "full": FP32, "full-untied": FP32, "last-layer": FP32, "sparse": FP32, "lora-held": FP32, "full-pulled": FP32,
    # A pass rounds its gradients to bf16 (2^-9), and the packs of two processes are not those of one.
    "full-bf16": (0.02, 0.1, 5e-3),
    # Muon's Newton-Schulz iterations are computed in bf16, over shards in another order.
    "muon": (0.01, 0.05, 2e-3),
}  # fmt: skip
"""Largest difference of a step's loss (nats), of its gradient norm (relative), and of the final weights (relative norm per tensor)."""
PLANTED_FACTOR = 10.0
TIMEOUT_SECONDS = 240


class Pair(NamedTuple):
    """What two processes did: `outcomes[rank][run]`, and the folder with their checkpoints and weights."""

    outcomes: list[dict[str, Any]]
    folder: Path

    def run(self, name: str, rank: int = 0) -> Outcome:
        return Outcome(**{key: _by_step(value) for key, value in self.outcomes[rank][name].items()})


def _by_step(value: Any) -> Any:
    return {int(step): figure for step, figure in value.items()} if isinstance(value, dict) and "message" not in value else value


@pytest.fixture(scope="module")
def models(tiny_folder: Callable) -> Path:
    """The folder with the twins' folders, by their names."""
    return {tiny_folder(family) for family in ("llama", "qwen2")}.pop().parent


@pytest.fixture(scope="module")
def pairs(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    folders = {which: tmp_path_factory.mktemp(which) for which in ("all", "killed")}
    for case in CHANGED:
        make(replace(case, name=f"{case.name}-by-one", stop_at=3), models, folders["all"])
    started = {which: _start(models, folder, which) for which, folder in folders.items()}
    try:
        for process in [process for pair in started.values() for process in pair]:
            process.wait(timeout=TIMEOUT_SECONDS)
    finally:
        for process in [process for pair in started.values() for process in pair]:
            process.kill()
            process.wait()
    # Whoever was killed has told nothing.
    return {
        which: Pair([_outcomes(folder, rank) for rank in range(1 if which == "killed" else 2)], folder) for which, folder in folders.items()
    }


def _start(models: Path, folder: Path, which: str) -> list[subprocess.Popen]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    source = Path(two_processes.__file__)
    command = [sys.executable, str(source), str(models), str(folder), which]
    environment = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }  # fmt: skip
    return [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stderr=(folder / f"stderr-{rank}").open("w")) for rank in range(2)
    ]


def _outcomes(folder: Path, rank: int) -> dict[str, Any]:
    path = folder / f"outcomes-{rank}.json"
    assert path.is_file(), (folder / f"stderr-{rank}").read_text()[-3000:]
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def both(pairs: dict[str, Pair]) -> Pair:
    return pairs["all"]


@pytest.fixture(scope="module")
def alone(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], tuple[Outcome, dict[str, torch.Tensor]]]:
    """The same run by one process, made once: its figures and weights. Planted errors are left out."""
    root = tmp_path_factory.mktemp("alone")
    made: dict[tuple, tuple[Outcome, dict[str, torch.Tensor]]] = {}

    def run(case: Case) -> tuple[Outcome, dict[str, torch.Tensor]]:
        # A method's settings hold a mapping, which has no hash.
        key = (repr(case.method), case.family, case.dtype, case.config)
        if key not in made:
            name = f"run-{len(made)}"
            made[key] = (make(replace(case, name=name, folder=name, around=contextlib.nullcontext), models, root), trained(root, name))
        return made[key]

    return run


class Differences(NamedTuple):
    loss: float
    grad_norm: float
    weights: float

    @classmethod
    def of(
        cls, found: Outcome, weights: dict[str, torch.Tensor], expected: Outcome, expected_weights: dict[str, torch.Tensor]
    ) -> Differences:
        assert weights.keys() == expected_weights.keys()
        return cls(
            max(abs(loss - expected.losses[step]) for step, loss in found.losses.items()),
            max(abs(norm / expected.grad_norms[step] - 1) for step, norm in found.grad_norms.items()),
            max(float((weights[name] - right).float().norm() / right.float().norm()) for name, right in expected_weights.items()),
        )


@pytest.mark.parametrize("case", SAME, ids=lambda case: case.name)
def test_two_processes_train_like_one(both: Pair, alone: Callable, case: Case):
    """Losses, gradient norms and final weights; also what is measured between steps, and the count of tokens."""
    outcome, (expected, expected_weights) = both.run(case.name), alone(case)
    assert outcome.error is None
    assert list(outcome.losses) == list(range(1, NUM_STEPS + 1))
    weights = trained(both.folder, case.name)
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {getattr(torch, case.dtype)}
    found = Differences.of(outcome, weights, expected, expected_weights)
    assert all(difference <= allowed for difference, allowed in zip(found, TOLERANCES[case.name])), found
    assert outcome.num_tokens == expected.num_tokens == 300
    assert outcome.validation_losses == pytest.approx(expected.validation_losses, abs=FP32[0])
    assert bool(outcome.validation_losses) == case.validated
    # The first one speaks for all.
    assert both.run(case.name, rank=1).losses == {}


def test_the_first_gradient_of_a_bf16_model_is_that_of_one_process(both: Pair, alone: Callable):
    """Before rounding has been amplified by updates, the tolerance can be small."""
    case = next(case for case in SAME if case.dtype == "bfloat16")
    assert both.run(case.name).grad_norms[1] == pytest.approx(alone(case)[0].grad_norms[1], rel=2e-3)


@pytest.mark.parametrize("case", PLANTED, ids=lambda case: case.name)
def test_a_planted_error_is_seen(both: Pair, alone: Callable, case: Case):
    found = Differences.of(both.run(case.name), trained(both.folder, case.name), *alone(case))
    # AdamW hides a gradient that is too large or too small by a factor from everything but its norm.
    assert max(found.loss / FP32[0], found.grad_norm / FP32[1]) > PLANTED_FACTOR


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_stopped_and_gone_on_by_two_gives_the_same_bytes(both: Pair, case: Case):
    whole, stopped, resumed = (both.run(f"{case.name}-{part}") for part in ("whole", "stopped", "resumed"))
    assert stopped.error is not None
    assert stopped.error["type"] == both.run(f"{case.name}-stopped", rank=1).error["type"] == "Interrupted"
    assert list(resumed.losses) == [5, 6]
    assert stopped.losses | resumed.losses == whole.losses
    assert stopped.grad_norms | resumed.grad_norms == whole.grad_norms
    left, right = trained(both.folder, f"{case.name}-whole"), trained(both.folder, f"{case.name}-resumed")
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("case", CHANGED, ids=lambda case: case.name)
def test_begun_by_one_and_finished_by_two(both: Pair, alone: Callable, case: Case):
    outcome = both.run(f"{case.name}-to-two")
    assert list(outcome.losses) == [4, 5, 6]
    found = Differences.of(outcome, trained(both.folder, f"{case.name}-to-two"), *alone(case))
    assert all(difference <= allowed for difference, allowed in zip(found, FP32)), found


@pytest.mark.parametrize("case", CHANGED, ids=lambda case: case.name)
def test_begun_by_two_and_finished_by_one(both: Pair, alone: Callable, models: Path, case: Case):
    outcome = make(replace(case, name=f"{case.name}-to-one", folder=f"{case.name}-by-two"), models, both.folder)
    assert list(outcome.losses) == [4, 5, 6]
    found = Differences.of(outcome, trained(both.folder, f"{case.name}-to-one"), *alone(case))
    assert all(difference <= allowed for difference, allowed in zip(found, FP32)), found


def test_a_sharded_checkpoint_is_safetensors_and_json_alone(both: Pair):
    """One file per process, no pickled index; half of the weights in each."""
    folder = list_checkpoints(both.folder / "full")[-1]
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    shards = [size for name, size in files.items() if name.endswith(".safetensors")]
    assert len(shards) == 2 == len(files) - 1
    assert "state.json" in files
    assert max(shards) < 1.2 * min(shards)
    # What proves saving, and what is half-written, leaves nothing behind.
    assert {path.name for path in (both.folder / "full").iterdir()} == {"step-00000004", "step-00000006", "trained"}


@pytest.mark.parametrize("name", ["ended-early", "ended-early-in-shards"])
def test_a_validation_loss_that_no_longer_falls_ends_the_run_of_both(both: Pair, name: str):
    outcomes = [both.run(name, rank) for rank in range(2)]
    assert list(outcomes[0].losses) == [1, 2, 3, 4]
    assert outcomes[0].validation_losses == {2: 1.0, 4: 2.0}
    assert outcomes[0].notices[-2].startswith("stopped after step 4 of 6: the validation loss has not fallen below 1.0000")
    assert [outcome.error for outcome in outcomes] == [None, None]
    assert outcomes[0].num_tokens == outcomes[1].num_tokens > 0


def test_a_loss_in_one_process_that_is_no_number_ends_the_run_of_both(both: Pair):
    errors = [both.run("lost-number", rank).error or {} for rank in range(2)]
    assert errors[0]["type"] == "TrainingError"
    assert errors[0]["message"].startswith("Training left the numbers at step")
    assert errors[1] == errors[0]
    assert [both.run("lost-number", rank).apart for rank in range(2)] == [False, False]


def test_processes_that_end_a_run_together_stay_together_however_long_the_last_write_takes(both: Pair):
    """The second one writes nothing: it must not take the first for lost, nor end before it."""
    for name, written in (("pruned", "step-00000001"), ("dropout-stopped", "step-00000004")):
        assert [both.run(name, rank).apart for rank in range(2)] == [False, False], name
        assert (both.folder / name / written).is_dir()


def test_an_error_in_one_process_is_the_error_of_both_and_the_next_run_begins(both: Pair):
    first, second = both.run("refused"), both.run("refused", rank=1)
    assert first.error is not None
    assert second.error is not None
    assert first.error["message"] == second.error["message"] == "This row is not to be learnt from"
    assert "process 1 of 2" in first.error["notes"][0]
    assert both.run("out-of-memory").error is None


def test_whoever_listens_to_the_first_process_can_end_the_run_of_both(both: Pair):
    outcomes = [both.run("ended-by-listener", rank) for rank in range(2)]
    assert list(outcomes[0].losses) == [1, 2]
    assert [outcome.error["message"] if outcome.error else None for outcome in outcomes] == ["This row is not to be learnt from"] * 2


def test_a_pruned_trial_is_one_in_both_and_an_error_that_cannot_travel_stays_itself_where_it_was_raised(both: Pair):
    """A sweep knows a pruned trial by the type of what the first process raises; nothing else ends it and goes on."""
    errors = {name: [both.run(name, rank).error or {} for rank in range(2)] for name in ("pruned", "homebound")}
    assert errors["pruned"] == [{"type": "TrialPruned", "message": "stopped at 25 %"}] * 2
    assert [error.get("type") for error in errors["homebound"]] == ["Homebound", "RuntimeError"]
    assert errors["homebound"][1]["message"] == "Homebound: step 2 has a loss of 1.5"


def test_a_shard_that_cannot_be_written_ends_the_run_of_both_and_leaves_nothing(both: Pair):
    outcomes = [both.run("no-room", rank) for rank in range(2)]
    assert ["larger than the system allows" in (outcome.error or {}).get("message", "") for outcome in outcomes] == [True, True]
    assert outcomes[0].losses.keys() <= {1, 2}
    assert list((both.folder / "no-room").iterdir()) == []


def test_a_disk_that_gives_one_process_no_shard_back_ends_the_run_of_both(both: Pair):
    outcomes = [both.run("no-proof", rank) for rank in range(2)]
    assert ["does not read back as it was written" in (outcome.error or {}).get("message", "") for outcome in outcomes] == [True, True]
    assert list((both.folder / "no-proof").iterdir()) == []


@pytest.mark.parametrize("name", ["torn", "unread", "lost"])
def test_a_sharded_checkpoint_that_one_process_cannot_read_is_left_out_by_both(both: Pair, alone: Callable, name: str):
    """A file that was cut short, one that only one process cannot read, and one that is gone."""
    outcome = both.run(f"{name}-resumed")
    assert outcome.error is None and both.run(f"{name}-resumed", rank=1).error is None
    (left_out,) = [notice for notice in outcome.notices if "cannot be read" in notice]
    assert "unreadable-step-00000004). It is left out: step-00000002 is taken up" in left_out
    assert list(outcome.losses) == [3, 4, 5, 6]
    found = Differences.of(outcome, trained(both.folder, f"{name}-resumed"), *alone(Case("full", FULL)))
    assert all(difference <= allowed for difference, allowed in zip(found, FP32)), found


def test_where_no_sharded_checkpoint_can_be_read_both_say_so(both: Pair):
    errors = [both.run("unreadable-resumed", rank).error or {} for rank in range(2)]
    assert [error.get("type") for error in errors] == ["DataError"] * 2
    assert all(error["message"].startswith("This checkpoint cannot be read: ") for error in errors)
    assert errors[0]["place"] == errors[1]["place"] == str(both.folder / "unreadable" / "step-00000002")


def test_memory_that_runs_out_in_one_process_makes_the_packs_of_both_smaller(both: Pair, alone: Callable):
    outcome = both.run("out-of-memory")
    assert [notice for notice in outcome.notices if "memory ran out" in notice]
    found = Differences.of(outcome, trained(both.folder, "out-of-memory"), *alone(Case("lora")))
    assert all(difference <= allowed for difference, allowed in zip(found, FP32)), found


def test_where_weights_are_sharded_the_others_learn_the_reason_too(both: Pair):
    error = both.run("refused-shards").error
    assert error is not None
    assert error["message"].startswith("This row is not to be learnt from, in process 1 of 2")
    assert error["type"] == "DataError"
    afterwards = both.run("afterwards").error
    assert afterwards is not None
    assert "lost each other" in afterwards["message"]


def test_a_killed_process_is_named_and_the_last_checkpoint_is_taken_up_by_one(pairs: dict[str, Pair], alone: Callable, models: Path):
    pair = pairs["killed"]
    error, name = pair.run("killed").error, pair.outcomes[0]["names"][1]
    assert error is not None
    assert error["type"] == "ResourceError"
    assert error["message"] == f"Process 1 of 2 ({name}) is gone, so the run stops at its last checkpoint"
    done = list_checkpoints(pair.folder / "killed")[-1]
    assert done.name >= "step-00000001"
    outcome = make(Case("taken-up", FULL, folder="killed"), models, pair.folder)
    assert outcome.notices[:-1] == [f"going on from step {int(done.name[5:])} of {NUM_STEPS}"]
    found = Differences.of(outcome, trained(pair.folder, "taken-up"), *alone(Case("full", FULL)))
    assert all(difference <= allowed for difference, allowed in zip(found, FP32)), found


# Without a second process


@pytest.mark.parametrize(
    ("lengths", "num_shares", "expected"),
    [
        # 9 and 5 + 4, then 3 to the first of equals, 2 to the other one.
        ([4, 9, 2, 5, 3], 2, [[1, 4], [0, 2, 3]]),
        ([7, 7, 7], 3, [[0], [1], [2]]),
        ([5], 2, [[0], []]),
        ([3, 1, 2], 1, [[0, 1, 2]]),
    ],
)
def test_rows_are_dealt_by_their_tokens(lengths: list[int], num_shares: int, expected: list[list[int]]):
    assert deal(lengths, num_shares) == expected


def rows_of(*lengths: int) -> list[Row]:
    return [Row(torch.arange(length).numpy(), torch.ones(length).index_fill(0, torch.tensor([0]), 0.0).numpy()) for length in lengths]


def test_sharded_processes_make_the_same_number_of_passes_and_each_row_counts_once(monkeypatch: pytest.MonkeyPatch):
    """Rows of 9, 9, 9 and 4 in packs of 10: three passes in one process and two in the other, plus one that counts nothing."""
    monkeypatch.setattr(distributed.dist, "new_group", lambda timeout: None)
    rows = rows_of(9, 4, 9, 9, 9)
    made = []
    for sharded in (False, True):
        processes = [Processes(rank, ("a", "b")) for rank in range(2)]
        for one in processes:
            one.sharded = sharded
        made.append([one.passes(rows, 10) for one in processes])
    for passes in made:
        counted = [row for part in passes for pack, factor in part for row in pack if factor]
        assert sorted(map(id, counted)) == sorted(map(id, rows))
    assert [len(part) for part in made[0]] == [3, 2]
    assert [len(part) for part in made[1]] == [3, 3]
    assert made[1][1][-1][1] == 0.0
    assert made[1][1][-1][0] == [rows[1]]


def test_one_layer_is_whole_in_fp32_at_a_time_while_weights_are_sharded(tiny_model: Callable, monkeypatch: pytest.MonkeyPatch):
    """Shards of a model that does not fit in fp32 must not begin with all of it in fp32."""
    model = tiny_model("llama", dtype="bfloat16").model.requires_grad_(True)
    parameters = dict(model.named_parameters())
    units: list[int] = []
    fully_shard = fsdp.fully_shard

    def watched(module: torch.nn.Module, **settings: Any) -> Any:
        own = sum(parameter.numel() for parameter in module.parameters() if not distributed.is_spread(parameter))
        in_fp32 = sum(parameter.numel() for parameter in parameters.values() if parameter.dtype == torch.float32)
        units.append(own)
        assert in_fp32 == own
        return fully_shard(module, **settings)

    monkeypatch.setattr(fsdp, "fully_shard", watched)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        processes = SimpleNamespace(size=2, group=dist.group.WORLD, sharded=False)
        shards = sharding.shard(model, parameters, processes)
        assert {name: p.shape for name, p in parameters.items() if p.numel()} == {}
        assert sum(units) == sum(shard.numel() for shard in shards.values()) and len(units) > 2
    finally:
        dist.destroy_process_group()


def test_a_first_process_that_is_busy_for_hours_is_not_lost(monkeypatch: pytest.MonkeyPatch):
    """One that dies is seen by its connections."""
    asked: list[timedelta] = []
    monkeypatch.setattr(distributed.dist, "new_group", lambda timeout: asked.append(timeout))
    Processes(1, ("a", "b"))
    assert asked[0] >= timedelta(hours=12)


class Meeting:
    """Two processes as threads of this one: what each does, and what it has in the end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(distributed.dist, "new_group", lambda timeout: None)
        self.processes = [Processes(rank, ("a", "b")) for rank in range(2)]
        self.barrier, self.values = threading.Barrier(2), [None, None]
        for rank, one in enumerate(self.processes):
            one.gather = partial(self.gather, rank)

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait(10)
        return list(self.values)

    def sums(self, *computed: Callable[[], dict[str, float]]) -> list[Any]:
        """What `sum_of` gives or raises in each."""

        def outcome(rank: int) -> Any:
            try:
                return self.processes[rank].sum_of(computed[rank])
            except Exception as error:
                return error

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(outcome, range(2)))


def raising(error: Exception) -> Callable[[], dict[str, float]]:
    def compute() -> dict[str, float]:
        raise error

    return compute


def test_processes_that_fail_in_different_ways_act_on_one_of_them(monkeypatch: pytest.MonkeyPatch):
    """Else one would make its packs smaller and compute on while the other has left."""
    full, stopped = MemoryError("no memory"), ResourceError("asked to stop")
    for errors in ([full, stopped], [stopped, full]):
        found = Meeting(monkeypatch).sums(*map(raising, errors))
        assert [type(error) for error in found] == [type(errors[0])] * 2
        # Its own error is itself, with its traceback; the other's has the name of its process.
        assert found[0] is errors[0]
        assert found[1].__notes__ == ["in process 0 of 2 (a)"]
    alone = Meeting(monkeypatch).sums(lambda: {"loss": 1.0}, raising(stopped))
    assert alone[1] is stopped and alone[0].__notes__ == ["in process 1 of 2 (b)"]
    assert Meeting(monkeypatch).sums(lambda: {"loss": 1.0}, lambda: {"loss": 0.5}) == [{"loss": 1.5}] * 2


def test_one_process_packs_as_ever():
    rows = rows_of(9, 4, 5)
    assert [(len(pack), factor) for pack, factor in ALONE.passes(rows, 10)] == [(1, 1.0), (2, 1.0)]


def test_seeds_differ_between_processes_and_the_first_keeps_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed.dist, "new_group", lambda timeout: None)
    seeds = [Processes(rank, ("a", "b", "c")).seed((11 << 32) ^ 5) for rank in range(3)]
    assert seeds[0] == (11 << 32) ^ 5 == ALONE.seed((11 << 32) ^ 5)
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_process_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ResourceError, match=r"2 of 3 processes did not come within 0.2 s: 1, 2"):
        connect(0.2)


def test_a_first_process_that_cannot_be_reached_is_named_by_its_address(monkeypatch: pytest.MonkeyPatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ResourceError, match="Process 1 of 2 cannot talk to the others") as caught:
        connect(1.0)
    assert caught.value.place == "127.0.0.1:9"


def test_alone_where_nobody_launched_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert connect() is ALONE


def test_only_a_back_end_s_words_mean_a_lost_process():
    assert is_lost(RuntimeError("[third_party/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:9902."))
    assert not is_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost(ValueError("gloo"))
    assert not is_lost(TrainingError("Training left the numbers at step 3 (rows [igloo.md:1])"))
