"""How much of this machine's matrix rate a training step of giong reaches, and where the rest of its time goes.

    python benchmarks/roofline.py --case lora-0.5b [--quick] [--repeats N]

The roof is measured in the process that has just trained, on the very products of its step: forward and input gradient of
every linear layer, the adapters, the head on the positions with loss (weight gradients too in full training). The share is
operations needed per token x tokens per second / that rate, so padding, upcasts and repeated work lower it. One further
step is profiled and its time summed into groups. Writes benchmarks/results/roofline-CASE.json and ends with key=value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from measuring import (
    GIONG,
    TRAINING_OPTIONS,
    choose_device,
    choose_dtype,
    describe_machine,
    interleave,
    job_of,
    known_cases,
    last_line,
    measure,
    medians,
    num_repeats,
    parser,
    train_settings,
    write_result,
)
from shapes import CASES


def summarise(measurements: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over processes: speed, rate, share, and the share of each group of operations in the profiled step."""
    good = [figures for figures in measurements if "failed" not in figures]
    if not good:
        return {"medians": None}
    rates = [figures["roofline"]["matrix_rate"] for figures in good]
    groups = good[0]["profile"]["shares"]
    return {
        "medians": medians(good),
        "matrix_flops_per_second": median(rate["flops_per_second"] for rate in rates),
        "matrix_flops_per_second_by_kind": {
            kind: median(rate["by_kind"][kind]["flops_per_second"] for rate in rates) for kind in rates[0]["by_kind"]
        },
        "roof_tokens_per_second": median(figures["roofline"]["roof_tokens_per_second"] for figures in good),
        "flops_per_token": good[0]["roofline"]["flops_per_token"],
        "attention_flops_per_token": good[0]["roofline"]["attention_flops_per_token"],
        "profile_shares": {group: median(figures["profile"]["shares"][group] for figures in good) for group in groups},
    }  # fmt: skip


def main() -> None:
    made = parser(__doc__, cases=known_cases(), default="lora-0.5b", repeats=3, honours=tuple(TRAINING_OPTIONS))
    options = made.parse_args()
    case = CASES[options.case]
    device = choose_device(options.device, case)
    options.dtype = choose_dtype(options.dtype, device)
    arm = dataclasses.replace(GIONG, settings=train_settings(options))
    # On a GPU the first steps compile kernels.
    steps = {"num_warmup_steps": 2 if device == "cpu" else 5, "num_steps": 2 if options.quick else 6}
    job = job_of(case, device, dtype=options.dtype, settings=arm.settings, matrix_rate=True, profile=True, **steps)
    result = {
        "machine": describe_machine(device),
        "work": {"case": dataclasses.asdict(case), "settings": arm.settings, "environment": arm.environment},
    }

    def keep(found: dict[str, list[dict[str, Any]]]) -> None:
        write_result(options, "roofline", {**result, **summarise(found[arm.name]), "measurements": found[arm.name]}, dtype=options.dtype)

    found = interleave([arm], num_repeats(options), lambda chosen, _: measure(chosen, job), keep)
    summary = summarise(found[arm.name])
    for group, share in summary.get("profile_shares", {}).items():
        print(f"{group:22s} {share:6.1%}")
    values = summary["medians"] or {}
    rate = summary.get("matrix_flops_per_second")
    print(
        last_line(
            roofline_share=values.get("roofline_share"), tokens_per_second=values.get("tokens_per_second"),
            roof_tokens_per_second=summary.get("roof_tokens_per_second"), matrix_teraflops_per_second=rate / 1e12 if rate else None,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
