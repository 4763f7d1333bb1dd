"""Time, memory and money of a training or generation run before it starts, here and elsewhere.

On this machine a short measured probe decides, because the share of its peak that a CPU reaches varies sixfold; what the probe does
not do is added by arithmetic (`benchmarks/estimates.py` compares the sum with real runs). Without a probe, and for all other
machines, all is arithmetic, given as a range and marked so. Prices of remote providers are for *their* models: the
comparison is of costs, never of equal results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Literal

from giong.config import MethodConfig
from giong.contracts import ModelShape
from giong.sizing.flops import (
    PROBE_LOSS_SHARE,
    PROBE_ROW_TOKENS,
    generation_flops_per_token,
    muon_flops,
    score_flops_per_token,
    scoring_after_probe,
    slowdown_after_probe,
    train_flops_per_token,
)
from giong.sizing.hardware import REFERENCE_DEVICES, ComputeDevice, Machine, device_of, this_machine
from giong.sizing.memory import (
    RUNTIME_BYTES,
    TrainingMemory,
    dtype_bytes,
    fits,
    generation_memory,
    kv_cache_bytes_per_token,
    training_memory,
)
from giong.sizing.prices import BUILT_IN_PRICES, MAX_PRICE_AGE_DAYS, FineTuningPrice, PriceTable, RentalPrice, rental_price

Basis = Literal["measured", "arithmetic"]

THIS_MACHINE = "this machine"

SMALL_MODEL_PARAMETERS = 500_000_000
"""Below this a GPU waits for its next kernel more than it computes, and the usual utilisation does not hold."""

OPTIMIZER_STEP_BYTES = 50
"""Memory traffic of an optimizer step per trainable parameter: norm, AdamW on master, gradient and moments, the copy into the model."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run on this machine will take. Arithmetic errs on the long side: `seconds` is then the upper bound. Memory is that of one
    process, where several share the rows.

    `needed_memory_bytes` is the least that the run can do with: it leaves out what is only used where it is free. The first
    `num_checkpointed_layers` layers are computed again in the backward pass; with `is_offloaded` what is kept for it waits in the host's
    memory. `write_seconds` are those of `seconds` in which answers are drawn, where they can be told apart.
    """

    seconds: float
    peak_memory_bytes: int
    usd: float
    basis: Basis
    needed_memory_bytes: int
    num_checkpointed_layers: int = 0
    is_offloaded: bool = False
    write_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class BackendEstimate:
    """What the same training would take elsewhere. None: not known (a provider does not say how long it takes).

    `fits` is None for a remote provider. `as_of` and `source` belong to the price; `notes` are whole sentences.
    """

    name: str
    kind: Literal["this_machine", "cpu", "gpu", "remote"]
    basis: Basis
    low_seconds: float | None
    high_seconds: float | None
    low_usd: float | None
    high_usd: float | None
    peak_memory_bytes: int | None
    fits: bool | None
    as_of: date | None = None
    source: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A training run as the estimates want to be told of it.

    `num_tokens` go forward and backward, counted in every epoch and update; `num_scored_tokens` go forward alone, in one process (answers
    that a reference scores); `num_choosing_tokens` go forward and backward before the first step, in one process (by which single weights are
    chosen); `num_written_tokens` are drawn there, `write_tokens_per_second` in the probe. Where answers are drawn, both
    are part of the steps; otherwise the scoring lies before the first one. `num_steps` counts updates. `num_processes` of this machine's
    kind share the rows of each step, and spread the weights over `num_shards` of them (1: each has all). `probe_tokens_per_second` is what
    the probe measured in one process; `run_tokens_per_second`, of a finished run like this one, is that of all processes together, with
    all that its steps do, and taken as it is. `row_tokens` is the mean length of a row and `loss_share` the share of tokens with loss;
    where they are not given, they are the probe's, and without a probe the most they can be. The longest row (`max_row_tokens`) may fill
    a pack; the largest pack has `num_pack_rows` rows. `num_anchors`, `has_kl`, `num_pack_lengths`, `num_row_lengths`,
    `num_lanes` and `runtime_bytes` (which count on a CPU alone) are those of `training_memory`; `lane_speedup` is how many times as fast as
    one after the other the probe's passes were in so many lanes, and `activation_checkpointing` and `activation_offload` the
    settings of these names. Raises ValueError for a speed that is not positive.
    """

    shape: ModelShape
    method: str | MethodConfig
    num_trainable: int
    num_tokens: int
    max_tokens_per_pack: int
    dtype: str
    probe_tokens_per_second: float | None = None
    run_tokens_per_second: float | None = None
    row_tokens: int | None = None
    max_row_tokens: int | None = None
    loss_share: float | None = None
    num_steps: int = 0
    num_processes: int = 1
    num_shards: int = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
    activation_checkpointing: Literal["auto", "none", "all"] | int = "none"
    activation_offload: Literal["auto"] | bool = False
    num_pack_rows: int | None = None
    num_scored_tokens: int = 0
    num_choosing_tokens: int = 0
    num_written_tokens: int = 0
    write_tokens_per_second: float | None = None
    num_anchors: int = 0
    has_kl: bool = False
    num_pack_lengths: int = 1
    num_row_lengths: int = 1
    num_lanes: int = 1
    lane_speedup: float = 1.0
    runtime_bytes: int = RUNTIME_BYTES

    def __post_init__(self) -> None:
        for name in ("probe_tokens_per_second", "run_tokens_per_second", "write_tokens_per_second"):
            if getattr(self, name) is not None:
                _positive(getattr(self, name), name)

    def flops(self, num_checkpointed_layers: int = 0) -> float:
        """Of the whole run, its updates and the drawing of answers aside, by arithmetic."""
        share = 1.0 if self.loss_share is None else self.loss_share
        row_tokens = self.row_tokens or self.max_tokens_per_pack
        per_token = train_flops_per_token(
            self.shape, self.method, self.num_trainable, row_tokens, loss_share=share, num_checkpointed_layers=num_checkpointed_layers,
            has_kl=self.has_kl,
        )  # fmt: skip
        scored = score_flops_per_token(self.shape, self.method, self.num_trainable, row_tokens, loss_share=share)
        return (self.num_tokens + self.num_choosing_tokens) * per_token + self.num_scored_tokens * scored

    def slowdowns(self, device: Literal["cpu", "gpu"], num_checkpointed_layers: int = 0) -> tuple[float, float]:
        """How many times longer than a token of the probe one of the steps takes, and one that goes forward alone."""
        share, row_tokens = PROBE_LOSS_SHARE if self.loss_share is None else self.loss_share, self.row_tokens or PROBE_ROW_TOKENS
        trained = slowdown_after_probe(
            self.shape, self.method, self.num_trainable, row_tokens, share, num_checkpointed_layers=num_checkpointed_layers,
            has_kl=self.has_kl, device=device,
        )  # fmt: skip
        return trained, scoring_after_probe(self.shape, self.method, self.num_trainable, row_tokens, share, device=device)

    @property
    def update_bytes(self) -> int:
        """Memory traffic of all optimizer steps."""
        return self.num_steps * self.num_trainable * OPTIMIZER_STEP_BYTES

    @property
    def update_flops(self) -> float:
        """Of all optimizer steps. AdamW's are bound by memory."""
        return self.num_steps * muon_flops(self.shape) if self.optimizer == "muon" else 0.0

    def num_layers_again(self, dtype: str, device: ComputeDevice, *, num_shards: int = 1) -> int:
        """How many layers `activation_checkpointing` computes again there; `auto` as few as fit, and all where nothing does."""
        num_layers = self.shape.num_hidden_layers
        if self.activation_checkpointing == "auto":
            peaks = (
                self.memory(dtype, device=device.kind, num_shards=num_shards, num_checkpointed_layers=number).needed_bytes
                for number in range(num_layers + 1)
            )
            return next((number for number, peak in enumerate(peaks) if fits(peak, device.memory_bytes) is not False), num_layers)
        named = {"none": 0, "all": num_layers}
        return named.get(self.activation_checkpointing, self.activation_checkpointing)  # type: ignore[arg-type,return-value]

    def is_offloaded(self, dtype: str, device: ComputeDevice, num_checkpointed_layers: int, *, num_shards: int = 1) -> bool:
        """Whether what is kept waits in the host's memory there: on a GPU where it is asked for, and with `auto` where nothing else fits."""
        if device.kind != "gpu" or self.activation_offload != "auto":
            return device.kind == "gpu" and self.activation_offload is True
        kept = self.memory(dtype, device=device.kind, num_shards=num_shards, num_checkpointed_layers=num_checkpointed_layers)
        return fits(kept.needed_bytes, device.memory_bytes) is False

    def memory(
        self, dtype: str, *, device: Literal["cpu", "gpu"], tokens_per_second: float | None = None, num_shards: int = 1,
        num_checkpointed_layers: int = 0, is_offloaded: bool = False,
    ) -> TrainingMemory:  # fmt: skip
        """As `training_memory`."""
        return training_memory(
            self.shape, self.method, self.num_trainable, self.max_tokens_per_pack, dtype, max_row_tokens=self.max_row_tokens,
            num_pack_rows=self.num_pack_rows, device=device, tokens_per_second=tokens_per_second, num_shards=num_shards,
            optimizer=self.optimizer, num_checkpointed_layers=num_checkpointed_layers, is_offloaded=is_offloaded,
            num_anchors=self.num_anchors, has_kl=self.has_kl, num_pack_lengths=self.num_pack_lengths,
            num_row_lengths=self.num_row_lengths, num_lanes=self.num_lanes if device == "cpu" else 1, runtime_bytes=self.runtime_bytes if device == "cpu" else RUNTIME_BYTES,
        )  # fmt: skip


def estimate_training(run: PlannedRun, *, machine: Machine | None = None, usd_per_hour: float = 0.0) -> Estimate:
    """Time, peak memory and cost of training here, on `machine`'s GPU where it has one; `usd_per_hour` is what this machine costs.

    Raises ValueError for an unknown method or dtype.
    """
    device = device_of(machine or this_machine(), run.dtype)
    # Processes take equal shares of the tokens, as if they never waited for each other, and each updates what it holds.
    num_tokens, speed, update_bytes = run.num_tokens / run.num_processes, None, run.update_bytes / run.num_shards
    update_flops, num_again = run.update_flops / run.num_shards, run.num_layers_again(run.dtype, device, num_shards=run.num_shards)
    is_offloaded, write_seconds = run.is_offloaded(run.dtype, device, num_again, num_shards=run.num_shards), 0.0
    trained, scored = run.slowdowns(device.kind, num_again)
    if run.run_tokens_per_second is not None:
        speed, update_bytes = run.run_tokens_per_second / run.num_processes, 0  # the updates are in it
        # And all that is done in the steps.
        num_scored = 0 if run.num_written_tokens else run.num_scored_tokens
        seconds, basis = (num_tokens + run.num_choosing_tokens + num_scored * scored / trained) / speed, "measured"
    elif run.probe_tokens_per_second is not None:
        speed = run.probe_tokens_per_second / trained * (run.lane_speedup if run.num_lanes > 1 else 1.0)
        probed = train_flops_per_token(run.shape, "lora", 0, PROBE_ROW_TOKENS, loss_share=PROBE_LOSS_SHARE)
        write_seconds = run.num_written_tokens / run.write_tokens_per_second if run.write_tokens_per_second else 0.0
        seconds = (
            (num_tokens + run.num_choosing_tokens) / speed + run.num_scored_tokens * scored / run.probe_tokens_per_second + write_seconds
        )
        seconds, basis = seconds + update_flops / (probed * run.probe_tokens_per_second), "measured"
    else:
        # Each has a GPU of its own, and a part of the CPU's cores.
        flops = run.flops(num_again) / (run.num_processes if device.kind == "gpu" else 1) + update_flops
        seconds, basis = flops / (device.peak_flops * device.low_utilisation), "arithmetic"
    memory = run.memory(
        run.dtype, device=device.kind, tokens_per_second=speed, num_shards=run.num_shards, num_checkpointed_layers=num_again,
        is_offloaded=is_offloaded,
    )  # fmt: skip
    seconds += update_bytes / device.reached_bandwidth
    return Estimate(
        seconds, memory.total_bytes, usd_per_hour * seconds / 3600, basis, memory.needed_bytes, num_again, is_offloaded, write_seconds
    )


def estimate_generation(
    shape: ModelShape,
    num_requests: int,
    prompt_tokens: float,
    completion_tokens: float,
    dtype: str,
    num_sequences: int = 1,
    measured_tokens_per_second: float | None = None,
    *,
    machine: Machine | None = None,
    usd_per_hour: float = 0.0,
) -> Estimate:
    """Time, peak memory and cost of answering `num_requests` here, `num_sequences` decoded together.

    `measured_tokens_per_second` counts tokens *written*, over all sequences. Without it: reading requests is bound by arithmetic,
    writing by memory, since every step reads all weights and the cache once (Pope et al. 2022, 2211.05102, section 2).
    Raises ValueError for an unknown dtype, and for a speed that is not positive.
    """
    per_sequence = prompt_tokens + completion_tokens
    together = max(1, min(num_sequences, num_requests))
    memory = generation_memory(shape, dtype, num_sequences=together, tokens_per_sequence=round(per_sequence))
    if measured_tokens_per_second is not None:
        seconds, basis = num_requests * completion_tokens / _positive(measured_tokens_per_second, "measured_tokens_per_second"), "measured"
    else:
        device = device_of(machine or this_machine(), dtype)
        speed = device.peak_flops * device.low_utilisation
        reading = num_requests * prompt_tokens * generation_flops_per_token(shape, prompt_tokens) / speed
        cache = together * (prompt_tokens + completion_tokens / 2) * kv_cache_bytes_per_token(shape, dtype)
        step_bytes = shape.num_parameters * dtype_bytes(dtype) + cache
        step_flops = together * generation_flops_per_token(shape, per_sequence)
        num_steps = -(-num_requests // together) * completion_tokens
        seconds = reading + num_steps * max(step_bytes / device.reached_bandwidth, step_flops / speed)
        basis = "arithmetic"
    return Estimate(seconds, memory.total_bytes, usd_per_hour * seconds / 3600, basis, memory.total_bytes)


def estimate_backends(
    run: PlannedRun,
    *,
    machine: Machine | None = None,
    today: date | None = None,
    max_price_age_days: int = MAX_PRICE_AGE_DAYS,
    own_usd_per_hour: Mapping[str, float] | None = None,
    devices: Sequence[ComputeDevice] = REFERENCE_DEVICES,
    prices: PriceTable = BUILT_IN_PRICES,
) -> list[BackendEstimate]:
    """This machine first, then the reference devices (one of each), then the remote providers that still take jobs, for the same tokens.

    `own_usd_per_hour` maps device names (and "this machine") to the user's own rates, which replace the table's. GPUs compute in bf16
    whatever the run's `dtype` is here. Remote tokens are counted by their own tokenizers, so that cost is approximate.
    """
    today, rates = today or date.today(), own_usd_per_hour or {}
    machine = machine or this_machine()
    here = estimate_training(run, machine=machine, usd_per_hour=rates.get(THIS_MACHINE, 0.0))
    rows = [_here(here, device_of(machine, run.dtype), run, is_free=not rates.get(THIS_MACHINE))]
    for device in devices:
        dtype = "bfloat16" if device.kind == "gpu" else run.dtype
        num_again = run.num_layers_again(dtype, device)
        is_offloaded = run.is_offloaded(dtype, device, num_again)
        memory = run.memory(dtype, device=device.kind, num_checkpointed_layers=num_again, is_offloaded=is_offloaded)
        is_small = device.kind == "gpu" and run.shape.num_parameters < SMALL_MODEL_PARAMETERS
        notes = ["So small a model does not keep a GPU busy: expect several times longer."] if is_small else []
        notes += _notes_on(run, num_again, is_offloaded, "arithmetic")
        flops = run.flops(num_again) + run.update_flops
        rows.append(
            _on_device(device, flops, run.update_bytes, memory, today, max_price_age_days, rates.get(device.name), notes, prices.rental)
        )
    rows.extend(_remote(price, run.num_tokens, today, max_price_age_days) for price in prices.fine_tuning if can_quote(price, today))
    return rows


def _notes_on(run: PlannedRun, num_again: int, is_offloaded: bool, basis: Basis) -> list[str]:
    why = " to fit into memory" if run.activation_checkpointing == "auto" else ""
    notes = [f"{num_again} of {run.shape.num_hidden_layers} layers are computed again{why}."] if num_again else []
    notes += ["Activations wait in the host's memory; the time for that is not counted."] if is_offloaded else []
    return notes + (["The drawing of answers is not counted."] if run.num_written_tokens and basis == "arithmetic" else [])


def _here(estimate: Estimate, device: ComputeDevice, run: PlannedRun, *, is_free: bool) -> BackendEstimate:
    # Without a probe the true speed may lie anywhere between the two usual shares of the peak.
    spread = 1.0 if estimate.basis == "measured" else device.high_utilisation / device.low_utilisation
    notes = [f"In {run.num_processes} processes; memory is that of each."] if run.num_processes > 1 else []
    notes += _notes_on(run, estimate.num_checkpointed_layers, estimate.is_offloaded, estimate.basis)
    if is_free:
        notes.append("Electricity is not counted.")
    return BackendEstimate(
        name=THIS_MACHINE,
        kind="this_machine",
        basis=estimate.basis,
        low_seconds=estimate.seconds / spread,
        high_seconds=estimate.seconds,
        low_usd=estimate.usd / spread,
        high_usd=estimate.usd,
        peak_memory_bytes=estimate.peak_memory_bytes,
        fits=fits(estimate.needed_memory_bytes, device.memory_bytes),
        notes=tuple(notes),
    )


def _on_device(
    device: ComputeDevice,
    flops: float,
    update_bytes: int,
    memory: TrainingMemory,
    today: date,
    max_age_days: int,
    own_rate: float | None,
    notes: list[str],
    rentals: Sequence[RentalPrice],
) -> BackendEstimate:
    low_seconds = flops / (device.peak_flops * device.high_utilisation) + update_bytes / device.bandwidth_bytes_per_second
    high_seconds = flops / (device.peak_flops * device.low_utilisation) + update_bytes / device.reached_bandwidth
    price = rental_price(device.name, today, max_age_days, rentals) if own_rate is None else None
    if price is not None or own_rate is not None:
        notes.append("Start-up, downloads and evaluation are not counted.")
    if price is not None and (warning := price.warning(today, max_age_days)):
        notes.append(warning)
    low_rate, high_rate = (price.low_usd_per_hour, price.high_usd_per_hour) if price else (own_rate, own_rate)
    return BackendEstimate(
        name=device.name,
        kind=device.kind,
        basis="arithmetic",
        low_seconds=low_seconds,
        high_seconds=high_seconds,
        low_usd=None if low_rate is None else low_rate * low_seconds / 3600,
        high_usd=None if high_rate is None else high_rate * high_seconds / 3600,
        peak_memory_bytes=memory.total_bytes,
        fits=fits(memory.needed_bytes, device.memory_bytes),
        as_of=price.as_of if price else None,
        source=price.source if price else "your own rate" if own_rate is not None else "",
        notes=tuple(notes),
    )


def can_quote(price: FineTuningPrice, today: date) -> bool:
    """By the token, and still open. Reinforcement fine-tuning by the hour is another kind of training."""
    return price.training_usd_per_million_tokens is not None and price.is_open(today)


def _remote(price: FineTuningPrice, num_tokens: int, today: date, max_age_days: int) -> BackendEstimate:
    usd = (price.training_usd_per_million_tokens or 0.0) * num_tokens / 1e6
    closing = f"Planned end of new jobs: {price.training_closes}." if price.training_closes else ""
    return BackendEstimate(
        name=price.name,
        kind="remote",
        basis="arithmetic",
        low_seconds=None,
        high_seconds=None,
        low_usd=usd,
        high_usd=usd,
        peak_memory_bytes=None,
        fits=None,
        as_of=price.as_of,
        source=price.source,
        notes=tuple(note for note in (price.note, closing, price.warning(today, max_age_days)) if note),
    )


def _positive(tokens_per_second: float, name: str) -> float:
    if not tokens_per_second > 0:
        raise ValueError(f"{name} must be positive, not {tokens_per_second}")
    return tokens_per_second
