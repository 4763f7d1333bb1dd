"""What it gives that passes of a step are computed side by side, each with its share of the cores, and not one after the other on all.

    python benchmarks/lanes.py --case lora-135m [--quick] [--repeats N]

The rows and steps of `train_speed`, one process per measurement, interleaved. Writes benchmarks/results/lanes-CASE.json and ends with
one line: speed and peak memory of passes side by side over those of the same engine without.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from measuring import (
    GIONG,
    choose_dtype,
    describe_machine,
    interleave,
    job_of,
    last_line,
    measure,
    medians,
    num_repeats,
    parser,
    write_result,
)
from shapes import CASES

ONE_LANE = dataclasses.replace(GIONG, name="one after the other", script="one_lane_arm.py")


def main() -> None:
    cases = [name for name, case in CASES.items() if case.method == "lora" and not case.needs_cuda]
    options = parser(__doc__, cases=cases, default="lora-135m", repeats=3, honours=("dtype",)).parse_args()
    case, device = CASES[options.case], "cpu"
    options.dtype = choose_dtype(options.dtype, device)
    job = job_of(case, device, dtype=options.dtype, num_warmup_steps=1 if options.quick else 2, num_steps=1 if options.quick else 4)
    result = {"machine": describe_machine(device), "work": {"case": dataclasses.asdict(case), "environment": GIONG.environment}}
    arms = (GIONG, ONE_LANE)

    def ratios(found: dict[str, list[dict[str, Any]]]) -> dict[str, float | None]:
        beside, alone = (medians(found[arm.name]) for arm in arms)
        names = ("tokens_per_second", "peak_memory_bytes")
        return {f"{name.removesuffix('_bytes')}_ratio": beside[name] / alone[name] if beside and alone else None for name in names}

    def keep(found: dict[str, list[dict[str, Any]]]) -> None:
        figures = {"medians": {name: medians(part) for name, part in found.items()}, **ratios(found), "measurements": found}
        write_result(options, Path(__file__).stem, {**result, **figures}, dtype=options.dtype)

    print(last_line(**ratios(interleave(arms, num_repeats(options), lambda arm, _: measure(arm, job), keep))))


if __name__ == "__main__":
    main()
