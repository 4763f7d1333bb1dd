"""Training runs that one or two processes make, for the tests of `engine/distributed.py`: the same function serves both.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=... python tests/two_processes.py MODELS FOLDER (all | killed)

Importing torch costs seconds, so two processes make all runs one after the other; what happened is written to
FOLDER/outcomes-RANK.json. The last of them ends badly on purpose, and so does the one that has two processes to itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from giong.config import MethodConfig, ModelConfig
from giong.contracts import Event, LossSum
from giong.engine import checkpoint, distributed
from giong.engine.checkpoint import list_checkpoints
from giong.engine.distributed import ALONE, Processes, connect
from giong.engine.loop import train
from giong.engine.loop_config import LoopConfig
from giong.engine.memory import ActivationPlan, activation_memory
from giong.engine.step import evaluate_rows
from giong.errors import DataError, GiongError
from giong.methods import METHODS
from giong.models.load import load_model
from giong.models.rows import Row
from giong.objectives import sft
from giong.workflow.trials import TrialPruned

CONFIG = LoopConfig(
    learning_rate=1e-2, num_epochs=2, batch_rows=3, max_tokens_per_pack=40, warmup_share=0.1, schedule="cosine",
    optimizer="adamw", weight_decay=0.01, max_grad_norm=1.0, seed=11, save_seconds=1e9, save_steps=None, keep_checkpoints=2,
)  # fmt: skip
NUM_STEPS = 6
LORA = MethodConfig(name="lora", lora_r=4, lora_alpha=8.0, lora_dropout=0.0)
DROPOUT_LORA = LORA.model_copy(update={"lora_dropout": 0.2})
FULL = MethodConfig(name="full")


def rows() -> list[Row]:
    """Eight rows of unequal lengths and weights; the last step of an epoch has two of them."""
    generator = np.random.default_rng(3)
    made = []
    for length in (9, 35, 14, 30, 12, 17, 25, 8):
        weights = np.ones(length, dtype=np.float32)
        weights[: length // 3] = 0.0
        made.append(Row(generator.integers(0, 300, size=length), weights))
    return made


@dataclass(frozen=True)
class Case:
    """One run. `stop_at`: asked to stop before that step (from 0), or with `stop_within` in its first pass; `validation_losses`: what
    is measured, whatever the model. `family` is a folder below MODELS; `folder` holds checkpoints."""

    name: str
    method: MethodConfig = LORA
    family: str = "llama"
    dtype: str = "float32"
    config: LoopConfig = CONFIG
    stop_at: int | None = None
    stop_within: bool = False
    folder: str = ""
    validated: bool = False
    validation_losses: tuple[float, ...] = ()
    num_checkpointed: int = 0
    wrap: Callable[[Processes], Callable] = lambda processes: sft.loss
    listen: Callable[[Event], None] = lambda event: None
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


@dataclass
class Outcome:
    """What a run showed: figures by step, and how it ended; `apart` says whether the processes have lost each other."""

    losses: dict[int, float] = field(default_factory=dict)
    grad_norms: dict[int, float] = field(default_factory=dict)
    validation_losses: dict[int, float] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    error: dict[str, Any] | None = None
    num_tokens: int = 0
    apart: bool = False


def make(case: Case, models: Path, root: Path, processes: Processes = ALONE) -> Outcome:
    """Do one run; the first process saves what it trained to root/NAME/trained."""
    outcome = Outcome()
    loaded = load_model(ModelConfig(name_or_path=str(models / case.family)), dtype=getattr(torch, case.dtype))
    trainable = METHODS[case.method.name].apply(loaded.model, case.method, seed=2)

    def emit(event: Event) -> None:
        if event.kind == "step":
            outcome.losses[event.data["step"]] = event.data["loss"]
            outcome.grad_norms[event.data["step"]] = event.data["grad_norm"]
        elif event.kind == "checkpoint" and "validation_loss" in event.data:
            outcome.validation_losses[event.data["step"]] = event.data["validation_loss"]
        elif event.kind == "notice":
            outcome.notices.append(event.message)
        case.listen(event)

    given_losses = iter(case.validation_losses)

    def validate() -> float:
        if case.validation_losses:
            return next(given_losses)
        logprobs = evaluate_rows(trainable.model, rows()[:3], 64)
        return -float(torch.cat(logprobs).mean())

    num_asked = 0

    def should_stop() -> bool:
        """Asked between steps, and then before the loss of every pass."""
        nonlocal num_asked
        num_asked += case.stop_at is not None and max(outcome.losses, default=0) >= case.stop_at
        return num_asked > (1 if case.stop_within else 0)

    try:
        with case.around(), activation_memory(trainable.model, ActivationPlan(case.num_checkpointed, False, 0, "")):
            result = train(
                trainable.model, trainable.parameters, rows(), case.wrap(processes), case.config, checkpoints=root / (case.folder or case.name),
                emit=emit, should_stop=should_stop,
                validate=validate if case.validated else None, processes=processes,
            )  # fmt: skip
        outcome.num_tokens = result.num_tokens
        if processes.is_first:
            trainable.save(root / case.name / "trained")
    except GiongError as error:
        outcome.error = {**error.to_dict(), "notes": getattr(error, "__notes__", [])}
    except (TrialPruned, Homebound, RuntimeError) as error:
        outcome.error = {"type": type(error).__name__, "message": str(error)}
    outcome.apart = processes.is_broken
    return outcome


def trained(root: Path, name: str) -> dict[str, torch.Tensor]:
    """The weights that a run saved."""
    from safetensors.torch import load_file

    return {key: tensor for file in sorted((root / name / "trained").glob("*.safetensors")) for key, tensor in load_file(file).items()}


# Things that go wrong in one process


def in_rank(rank: int, call: int, action: Callable[[], None]) -> Callable[[Processes], Callable]:
    """An objective that does something in one process, at its call of that number (from 0)."""

    def wrap(processes: Processes) -> Callable:
        calls = iter(range(10**6))

        def objective(tensors: dict[str, torch.Tensor]) -> LossSum:
            if next(calls) == call and processes.rank == rank:
                action()
            return sft.loss(tensors)

        return objective

    return wrap


def lose_the_number(processes: Processes) -> Callable:
    """An objective whose third loss in the second process is no number."""
    calls = iter(range(10**6))

    def objective(tensors: dict[str, torch.Tensor]) -> LossSum:
        result = sft.loss(tensors)
        is_lost = next(calls) == 2 and processes.rank == 1
        return replace(result, loss_sum=result.loss_sum * float("nan")) if is_lost else result

    return objective


def refuse() -> None:
    raise DataError("This row is not to be learnt from", place="row 3")


def refuse_the_second_step(event: Event) -> None:
    if event.kind == "step" and event.data["step"] == 2:
        refuse()


class Homebound(Exception):
    """An error that cannot be unpickled: made of two values, and only their sentence is kept."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"step {step} has a loss of {loss}")


def prune_the_second_step(event: Event) -> None:
    if event.kind == "step" and event.data["step"] == 2:
        raise TrialPruned(25, 1.5)


def leave_at_the_second_step(event: Event) -> None:
    if event.kind == "step" and event.data["step"] == 2:
        raise Homebound(2, 1.5)


def run_out_of_memory() -> None:
    raise MemoryError("can't allocate memory")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def small_files_in_one() -> Iterator[None]:
    """The system refuses large files to the second process, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if os.environ.get("RANK") == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def slow_writes() -> contextlib.AbstractContextManager:
    """A checkpoint takes longer to write than processes wait for each other's words."""
    write = checkpoint.save_checkpoint

    def slowly(*given: Any) -> Path:
        time.sleep(1.5 * distributed.WORD_SECONDS)
        return write(*given)

    return replaced(checkpoint, "save_checkpoint", slowly)


@contextlib.contextmanager
def shards_unread_in_one(part: str) -> Iterator[None]:
    """The second process cannot read the data of checkpoints with this in their names."""
    from safetensors import SafetensorError
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    right = HuggingFaceStorageReader.read_data

    def wrong(self: HuggingFaceStorageReader, *given: Any) -> Any:
        if os.environ.get("RANK") == "1" and part in str(self.path):
            raise SafetensorError("incomplete metadata")
        return right(self, *given)

    with replaced(HuggingFaceStorageReader, "read_data", wrong):
        yield


def cut_the_newest_short(folder: Path) -> None:
    file = sorted(list_checkpoints(folder)[-1].glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lose_a_file_of_the_newest(folder: Path) -> None:
    sorted(list_checkpoints(folder)[-1].glob("*.safetensors"))[0].unlink()


def cut_all_short(folder: Path) -> None:
    for saved in list_checkpoints(folder):
        for file in saved.glob("*.safetensors"):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


# Planted errors


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def without_sum() -> contextlib.AbstractContextManager:
    """Every process updates with its own gradient."""
    return replaced(Processes, "sum_tensor", lambda self, tensor: None)


def mean_of_means() -> contextlib.AbstractContextManager:
    """Each process divides by the weight of its own rows, and the processes' gradients are averaged."""
    right = Processes.passes

    def wrong(self: Processes, rows: list[Row], max_tokens: int, lanes: int) -> list[tuple[list[Row], float]]:
        passes = right(self, rows, max_tokens, lanes)
        own, every = (
            sum(float(row.weights.sum()) for row in part) for part in ([row for part, factor in passes if factor for row in part], rows)
        )
        return [(part, factor * every / (own * self.size) if own else 0.0) for part, factor in passes]

    return replaced(Processes, "passes", wrong)


def averaged_shards() -> contextlib.AbstractContextManager:
    """FSDP's own default: gradients are averaged over the processes."""
    from torch.distributed.fsdp import FSDPModule

    right = FSDPModule.set_gradient_divide_factor
    return replaced(FSDPModule, "set_gradient_divide_factor", lambda self, factor: right(self, 2.0))


SAVED = replace(CONFIG, eval_steps=2)
SMALLER = replace(CONFIG, max_tokens_per_pack=200)
MUON = replace(CONFIG, optimizer="muon")
HELD = replace(SAVED, kl_weight=0.3, neftune_noise_alpha=5.0, early_stopping_patience=50)
PATIENT = replace(SAVED, early_stopping_patience=1)
PULLED = replace(CONFIG, l2_to_base=5.0, neftune_noise_alpha=5.0)

SAME = [
    Case("lora", validated=True, config=SAVED),
    Case("full", FULL, "qwen2", validated=True, config=SAVED),
    Case("full-untied", FULL, num_checkpointed=1),
    # A tenth of the rate: at 1e-2 six steps amplify what a processor's bf16 products round away to a fifth of a nat.
    Case("full-bf16", FULL, dtype="bfloat16", config=replace(CONFIG, learning_rate=1e-3)),
    Case("muon", FULL, config=MUON),
    Case("lora-held", validated=True, config=HELD),
    Case("full-pulled", FULL, config=PULLED),
    Case("last-layer", MethodConfig(name="last_layers", num_layers=1, train_head=True)),
    Case("sparse", MethodConfig(name="sparse", sparse_share=0.02, sparse_score="magnitude")),
]  # fmt: skip
"""Runs that two processes make like one."""
EXACT = [Case("dropout", DROPOUT_LORA), Case("shards", FULL)]
"""Runs that are stopped within step 5, while writing is slow, and go on to the same bytes."""
CHANGED = [Case("lora-moved"), Case("full-moved", FULL, "qwen2")]
"""Runs that are stopped at step 3 and go on with another number of processes."""
PLANTED = [
    Case("lora-without-sum", around=without_sum), Case("lora-mean-of-means", around=mean_of_means),
    Case("full-mean-of-means", FULL, "qwen2", around=mean_of_means), Case("full-averaged", FULL, "qwen2", around=averaged_shards),
]  # fmt: skip
ENDED = [
    Case("ended-early", validated=True, config=PATIENT, validation_losses=(1.0, 2.0)),
    Case("ended-early-in-shards", FULL, validated=True, config=PATIENT, validation_losses=(1.0, 2.0)),
    Case("lost-number", wrap=lose_the_number),
]  # fmt: skip
"""Runs that both end before the last step, the first two well."""
AGREED = [
    Case("no-room", FULL, around=small_files_in_one),
    Case("no-proof", FULL, around=partial(shards_unread_in_one, "step-proof")),
    Case("ended-by-listener", listen=refuse_the_second_step),
    Case("pruned", listen=prune_the_second_step, config=replace(CONFIG, save_steps=1), around=slow_writes),
    Case("homebound", listen=leave_at_the_second_step),
    Case("refused", wrap=in_rank(1, 2, refuse), config=replace(CONFIG, save_steps=1)),
    Case("out-of-memory", wrap=in_rank(1, 2, run_out_of_memory), config=SMALLER),
]
"""What goes wrong in one process and is known to both at the end of the step."""
SPOILED: dict[str, tuple[Case, Callable[[Path], None]]] = {
    "torn": (Case("torn", FULL), cut_the_newest_short),
    "unread": (Case("unread", FULL, around=partial(shards_unread_in_one, "step-00000004")), lambda folder: None),
    "lost": (Case("lost", FULL), lose_a_file_of_the_newest),
    "unreadable": (Case("unreadable", FULL), cut_all_short),
}  # fmt: skip
"""Runs that are stopped at step 4 with checkpoints of steps 2 and 4, and what becomes of these before they go on."""
REFUSED_SHARDS = Case("refused-shards", FULL, wrap=in_rank(1, 5, refuse))
AFTERWARDS = Case("afterwards")
KILLED = Case("killed", FULL, config=replace(CONFIG, save_steps=1), wrap=in_rank(1, 6, die))


def main(models: Path, root: Path, which: str) -> None:
    torch.set_num_threads(1)
    distributed.WORD_SECONDS = 2.0
    processes = connect(60.0)
    outcomes: dict[str, Any] = {"names": processes.names}

    def do(case: Case, name: str, folder: str) -> None:
        outcomes[name] = asdict(make(replace(case, name=name, folder=folder), models, root, processes))
        (root / f"outcomes-{processes.rank}.json").write_text(json.dumps(outcomes))

    if which == "killed":
        do(KILLED, "killed", "killed")
        return
    for case in SAME + PLANTED + ENDED + AGREED:
        do(case, case.name, case.name)
    for case in EXACT:
        do(case, f"{case.name}-whole", f"{case.name}-whole")
        do(replace(case, stop_at=4, stop_within=True, around=slow_writes), f"{case.name}-stopped", f"{case.name}-stopped")
        do(case, f"{case.name}-resumed", f"{case.name}-stopped")
    for case in CHANGED:
        do(replace(case, stop_at=3), f"{case.name}-by-two", f"{case.name}-by-two")
        do(case, f"{case.name}-to-two", f"{case.name}-by-one")
    for name, (case, spoil) in SPOILED.items():
        do(replace(case, stop_at=4, config=replace(CONFIG, save_steps=2), around=contextlib.nullcontext), f"{name}-stopped", name)
        processes.first(partial(spoil, root / name))
        do(case, f"{name}-resumed", name)
    do(REFUSED_SHARDS, "refused-shards", "refused-shards")
    if processes.is_first:
        do(AFTERWARDS, "afterwards", "afterwards")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
