"""What `sizing` says about memory and time before anything is loaded, against what training then takes.

    python benchmarks/estimates.py [--case all|METHOD-SHAPE] [--quick] [--repeats N]

Per case and token budget: the estimate from the model's config.json and giong's own probe, and a process that trains as a worker
does, on packs as full as the budget allows. Writes benchmarks/results/estimates-CASE.json, prints a table and ends with the
largest errors and whether they are within what is promised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from measuring import (
    GIONG,
    Arm,
    choose_dtype,
    describe_machine,
    job_of,
    last_line,
    measure,
    medians,
    model_folder,
    num_repeats,
    parser,
    write_result,
)
from recording import Job
from shapes import CASES, LORA_R, RowMix

from giong.sizing.estimate import Estimate, PlannedRun, estimate_training
from giong.sizing.hardware import this_machine
from giong.sizing.lanes import num_lanes
from giong.sizing.shapes import num_trainable_parameters, shape_from_config

PROBE = Arm("probe", "probe_arm.py", environment=GIONG.environment)
TOKEN_BUDGETS = {"bundled": (1024, 2048, 4096), "135m": (1024, 2048, 4096), "0.5b": (1024, 2048, 4096), "tiny": (512, 1024)}
ALL = ("lora-bundled", "full-bundled", "lora-135m", "full-135m", "lora-0.5b")
MIN_ROW_TOKENS, MAX_ROW_TOKENS = 240, 256
TOLERANCES = {"peak_memory_bytes": 0.10, "tokens_per_second": 0.25}
"""What is promised: of the measured peak, and of the measured tokens per second."""


def rows_of(max_tokens_per_pack: int) -> RowMix:
    """One optimizer step that is one full pack: chat rows of about 250 tokens, 58 % of them answer."""
    return RowMix(max_tokens_per_pack // MAX_ROW_TOKENS, MIN_ROW_TOKENS, MAX_ROW_TOKENS, answer_share=0.58)


def predict(
    config: Mapping[str, Any], method: str, max_tokens_per_pack: int, dtype: str, probe: Mapping[str, float] | None
) -> tuple[Estimate, int]:
    """(estimate, number of tokens it is for) of one step, from a config.json and the figures of a probe."""
    shape, mix = shape_from_config(config), rows_of(max_tokens_per_pack)
    lengths = [len(ids) for ids, _ in mix.draw(shape.vocab_size)]
    num_trainable = num_trainable_parameters(shape, method, LORA_R)
    share = num_trainable / shape.num_parameters
    lanes = num_lanes(lengths, max_tokens_per_pack, width=shape.hidden_size, moving_share=share, num_threads=this_machine().num_cores)
    run = PlannedRun(
        shape, method, num_trainable, sum(lengths), max_tokens_per_pack, dtype, probe and probe["train_tokens_per_second"],
        num_lanes=lanes, lane_speedup=probe["lane_speedup"] if probe else 1.0,
        row_tokens=round(sum(lengths) / len(lengths)), max_row_tokens=max(lengths), loss_share=mix.answer_share, num_steps=1,
    )  # fmt: skip
    return estimate_training(run), run.num_tokens


def point_of(
    case: str, max_tokens_per_pack: int, dtype: str, probe: Mapping[str, float] | None, measurements: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Predicted and measured of one case and budget, relative errors (positive: predicted too much); None: not measured."""
    reached = medians(measurements)
    estimate, num_tokens = predict(model_folder(CASES[case].shape)[1], CASES[case].method, max_tokens_per_pack, dtype, probe)
    predicted = {"tokens_per_second": num_tokens / estimate.seconds if probe else None, "peak_memory_bytes": estimate.peak_memory_bytes}
    errors = {name: value / reached[name] - 1 if reached and value else None for name, value in predicted.items()}
    return {
        "case": case, "max_tokens_per_pack": max_tokens_per_pack, "probe_tokens_per_second": probe and probe["train_tokens_per_second"],
        "lane_speedup": probe and probe["lane_speedup"],
        "predicted": predicted | {"needed_memory_bytes": estimate.needed_memory_bytes}, "medians": reached, "errors": errors,
    }  # fmt: skip


def largest_error(points: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The one furthest from zero, with its sign."""
    return max((point["errors"][name] for point in points if point["errors"][name] is not None), key=abs, default=None)


def is_outside(name: str, error: float | None) -> bool:
    """More than is promised, either way."""
    return error is not None and abs(error) > TOLERANCES[name]


def within(points: Sequence[Mapping[str, Any]], name: str) -> str | None:
    """Yes where every point keeps what is promised, no where one does not; None: not all were measured."""
    errors = [point["errors"][name] for point in points]
    if any(is_outside(name, error) for error in errors):
        return "no"
    return "yes" if errors and None not in errors else None


def print_point(point: Mapping[str, Any]) -> None:
    start = f"{point['case']:16s} {point['max_tokens_per_pack']:6d} tokens"
    if not point["medians"]:
        print(f"{start}  failed", flush=True)
        return
    predicted, reached, errors = point["predicted"], point["medians"], point["errors"]
    outside = {name: " (outside)" if is_outside(name, error) else "" for name, error in errors.items()}
    speed = (
        f"{predicted['tokens_per_second']:8.0f} {reached['tokens_per_second']:8.0f} {errors['tokens_per_second']:+7.1%}"
        if errors["tokens_per_second"] is not None
        else "no probe"
    )
    memory = f"{predicted['peak_memory_bytes'] / 1e9:7.2f} {reached['peak_memory_bytes'] / 1e9:7.2f} GB {errors['peak_memory_bytes']:+7.1%}"
    print(f"{start} {memory}{outside['peak_memory_bytes']}   {speed} tokens/s{outside['tokens_per_second']}", flush=True)


def main() -> None:
    made = parser(__doc__, cases=["all", *ALL, "lora-tiny", "full-tiny"], default="all", repeats=1, honours=("dtype",))
    options = made.parse_args()
    device, cases = "cpu", ALL if options.case == "all" else (options.case,)
    options.dtype = choose_dtype(options.dtype, device)
    # The proof that saving works runs beside the second step: its memory counts, its time does not.
    steps = {"num_warmup_steps": 2, "num_steps": 1 if options.quick else 2}
    result: dict[str, Any] = {
        "machine": describe_machine(device), "tolerances": TOLERANCES,
        "work": {"lora_r": LORA_R, "steps": steps, "environment": GIONG.environment},
    }  # fmt: skip
    points: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    probes: dict[str, dict[str, float] | None] = {}
    print(f"{'':30s} predicted, measured, error of the peak memory, and of the speed")
    for case in cases:
        budgets = TOKEN_BUDGETS[CASES[case].shape]
        for budget in budgets[:1] if options.quick else budgets:
            job: Job = job_of(CASES[case], device, mix=rows_of(budget), max_tokens_per_pack=budget, dtype=options.dtype, **steps)
            if job.model not in probes:
                speeds = [measure(PROBE, job) for _ in range(num_repeats(options))]
                good = [speed for speed in speeds if "failed" not in speed]
                names = ("train_tokens_per_second", "lane_speedup")
                probes[job.model] = {name: median(speed[name] for speed in good) for name in names} if good else None
            measured = [measure(GIONG, job) for _ in range(num_repeats(options))]
            found += [{"case": case, "max_tokens_per_pack": budget, **figures} for figures in measured]
            points.append(point_of(case, budget, options.dtype, probes[job.model], measured))
            print_point(points[-1])
            write_result(options, "estimates", {**result, "points": points, "measurements": found}, dtype=options.dtype)
    print(
        last_line(
            memory_error=largest_error(points, "peak_memory_bytes"), within_memory=within(points, "peak_memory_bytes"),
            speed_error=largest_error(points, "tokens_per_second"), within_time=within(points, "tokens_per_second"),
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
