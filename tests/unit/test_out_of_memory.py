"""Out of memory: smaller packs, the same rows per step, the same gradient; a resumed run goes on with the smaller packs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_loop import CONFIG, DROPOUT_LORA, FULL, Run, assert_same_bytes

from giong.contracts import LossSum
from giong.engine.checkpoint import list_checkpoints, load_checkpoint
from giong.engine.out_of_memory import is_out_of_memory, smaller_budget
from giong.errors import Interrupted, ResourceError
from giong.objectives import sft

PLAIN_LORA = DROPOUT_LORA.model_copy(update={"lora_dropout": 0.0})
CPU_REFUSAL = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."


def refusing(run: Run, max_rows: int, *, at_step: int = 0, error: Callable[[], Exception] = MemoryError) -> Callable:
    """An objective for which packs of more rows do not fit; its first pack of each step always does."""
    passes: dict[int, int] = {}

    def objective(tensors: dict[str, torch.Tensor]) -> LossSum:
        step = run.step_done()
        passes[step] = passes.get(step, 0) + 1
        if step >= at_step and passes[step] > 1 and len(tensors["row_of_N"].unique()) > max_rows:
            raise error()
        return sft.loss(tensors)

    return objective


def largest(run: Run, tmp_path: Path) -> list[int]:
    return [event.data["max_tokens_per_pack"] for event in run.events if "max_tokens_per_pack" in event.data]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError,
        lambda: RuntimeError(CPU_REFUSAL),
        lambda: RuntimeError("DefaultCPUAllocator: not enough memory"),
        torch.OutOfMemoryError,
    ],
    ids=["MemoryError", "Linux", "Windows", "CUDA"],
)
def test_smaller_packs_give_the_same_run(tiny_model: Callable, tmp_path: Path, error: Callable[[], Exception]):
    """Eight rows a step in two packs; the second does not fit, so the first one's gradient has to be forgotten."""
    config = replace(CONFIG, batch_rows=8, max_tokens_per_pack=70, num_epochs=6)
    roomy, tight = Run(tiny_model, tmp_path / "roomy", PLAIN_LORA, config), Run(tiny_model, tmp_path / "tight", PLAIN_LORA, config)
    roomy.go()
    result = tight.go(objective=refusing(tight, max_rows=2, error=error))
    assert result.num_steps == 6
    assert result.max_tokens_per_pack < 70
    assert list(roomy.losses().values()) == pytest.approx(list(tight.losses().values()), abs=1e-4)
    grad_norms = [[event.data["grad_norm"] for event in run.events if event.kind == "step"] for run in (roomy, tight)]
    assert grad_norms[0] == pytest.approx(grad_norms[1], rel=1e-3)
    told = [event for event in tight.events if event.kind == "notice" and "tokens a second" not in event.message]
    assert told and all("memory ran out" in event.message and event.data["step"] == 0 for event in told)
    assert told[-1].data["max_tokens_per_pack"] == result.max_tokens_per_pack


def test_a_gradient_that_is_not_forgotten_would_be_seen(tiny_model: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The planted error of the test above."""
    from giong.engine import loop

    config = replace(CONFIG, batch_rows=8, max_tokens_per_pack=70, num_epochs=6)
    roomy, tight = Run(tiny_model, tmp_path / "roomy", PLAIN_LORA, config), Run(tiny_model, tmp_path / "tight", PLAIN_LORA, config)
    roomy.go()
    monkeypatch.setattr(loop, "drop_gradients", lambda optimizer: None)
    tight.go(objective=refusing(tight, max_rows=2))
    grad_norms = [[event.data["grad_norm"] for event in run.events if event.kind == "step"] for run in (roomy, tight)]
    assert grad_norms[0][0] != pytest.approx(grad_norms[1][0], rel=1e-2)


@pytest.mark.parametrize("method", [DROPOUT_LORA, FULL], ids=["lora with dropout", "full in bf16"])
def test_a_resumed_run_repeats_the_smaller_packs(tiny_model: Callable, tmp_path: Path, method):  # type: ignore[no-untyped-def]
    config = replace(CONFIG, batch_rows=8, max_tokens_per_pack=70, num_epochs=8)
    whole, stopped = Run(tiny_model, tmp_path / "whole", method, config), Run(tiny_model, tmp_path / "stopped", method, config)
    whole.go(objective=refusing(whole, max_rows=2, at_step=2))
    with pytest.raises(Interrupted):
        stopped.go(stop_at=5, objective=refusing(stopped, max_rows=2, at_step=2))
    _, state = load_checkpoint(list_checkpoints(tmp_path / "stopped")[-1])
    assert state["max_tokens_per_pack"] == min(largest(stopped, tmp_path)) < 70
    # Memory suffices now: the packs stay small all the same.
    stopped.go()
    assert whole.losses() == stopped.losses()
    assert_same_bytes(whole.weights(), stopped.weights())


def test_a_single_row_that_does_not_fit_is_named(tiny_model: Callable, tmp_path: Path):
    run = Run(tiny_model, tmp_path, config=replace(CONFIG, batch_rows=8, max_tokens_per_pack=1000))

    def objective(tensors: dict[str, torch.Tensor]) -> LossSum:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ResourceError, match="A single row of 30 tokens does not fit into memory") as caught:
        run.go(objective=objective)
    assert caught.value.place == "row 3"
    assert "max_seq_length" in caught.value.remedy
    assert run.saved == []


def test_other_errors_are_not_taken_for_it(tiny_model: Callable, tmp_path: Path):
    run = Run(tiny_model, tmp_path)

    def objective(tensors: dict[str, torch.Tensor]) -> LossSum:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        run.go(objective=objective)
    assert not is_out_of_memory(ValueError("not enough memory"))


def test_the_next_budget_by_hand():
    # Two packs of 70 under 100: 50 + 20 and 40 + 30; three under 55, of which the smaller rows share one.
    assert smaller_budget([50, 40, 30, 20], 100) == 35
    assert smaller_budget([50, 40, 30, 20], 55) == 25
    assert smaller_budget([50, 40, 30, 20], 45) is None
    assert smaller_budget([300], 100) is None
    # A row that is longer than any pack stands alone and does not count: the others may still shrink.
    assert smaller_budget([300, 30, 20], 100) == 25


REAL_REFUSAL = """
import resource, sys, torch
from giong.engine.out_of_memory import is_out_of_memory
size = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + 2**26, resource.RLIM_INFINITY))
try:
    torch.ones(2**28)
except RuntimeError as error:
    sys.exit(0 if is_out_of_memory(error) else str(error))
sys.exit("it fitted")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits address space as Linux does")
def test_what_the_allocator_really_says_is_known():
    result = subprocess.run([sys.executable, "-c", REAL_REFUSAL], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-500:]
