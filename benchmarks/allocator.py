"""Does the allocator setting of the workers pay? giong's training speed under several allocators, interleaved.

    python benchmarks/allocator.py [--case lora-bundled] [--quick] [--repeats N]

Each measurement is a process of its own, because an allocator reads its settings once. jemalloc and mimalloc are preloaded
where their shared libraries are found; where not, the result says so. Writes benchmarks/results/allocator-CASE.json and ends
with one line of key=value pairs: tokens per second over glibc's defaults.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from measuring import (
    GIONG,
    Arm,
    choose_dtype,
    describe_machine,
    find_library,
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

from giong.jobs.supervisor import ALLOCATOR

GLIBC = {
    "glibc_defaults": {},
    # Above glibc's limit of 32 MiB: refused in silence, and the trim threshold then freezes the other one at 128 KiB.
    "threshold_refused": {"MALLOC_MMAP_THRESHOLD_": str(4 * 1024**3), "MALLOC_TRIM_THRESHOLD_": str(8 * 1024**3)},
    "giong": dict(ALLOCATOR),
}
PRELOADED = ("jemalloc", "mimalloc", "tcmalloc")


def environments(named: Sequence[Path]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """(environment of each allocator that can be had here, what is missing). `named` libraries come before those that are found."""
    found, missing = dict(GLIBC), {}
    for name in PRELOADED:
        library = next((str(path) for path in named if name in path.name), None) or find_library(name)
        if library:
            found[name] = {"LD_PRELOAD": library}
        else:
            missing[name] = f"no lib{name}.so was found"
    return found, missing


def over_defaults(found: Mapping[str, list[dict[str, Any]]]) -> dict[str, float | None]:
    """Median tokens per second of each allocator over glibc's defaults; None where either was not measured."""
    table = {name: medians(values) for name, values in found.items()}
    base = table.get("glibc_defaults")
    return {name: value["tokens_per_second"] / base["tokens_per_second"] if value and base else None for name, value in table.items()}


def main() -> None:
    made = parser(__doc__, cases=known_cases(cpu_only=True), default="lora-bundled", repeats=5, honours=("dtype", "set"))
    made.add_argument("--library", action="append", type=Path, default=[], help="a libjemalloc.so (mimalloc, tcmalloc) that lies elsewhere")
    options = made.parse_args()
    # On a GPU torch brings an allocator of its own.
    case, device = CASES[options.case], "cpu"
    options.dtype = choose_dtype(options.dtype, device)
    chosen, missing = environments(options.library)
    for name, reason in missing.items():
        print(f"{name}: not measured, {reason}", file=sys.stderr)
    settings = train_settings(options)
    arms = [Arm(name, GIONG.script, settings, environment) for name, environment in chosen.items()]
    job = job_of(case, device, dtype=options.dtype, settings=settings, num_warmup_steps=2, num_steps=2 if options.quick else 6)
    result = {
        "machine": describe_machine(device), "missing": missing, "work": {"case": dataclasses.asdict(case), "environments": chosen, "settings": settings},
    }  # fmt: skip

    def keep(found: dict[str, list[dict[str, Any]]]) -> None:
        summary = {name: medians(values) for name, values in found.items()}
        faults = {
            name: median(figures["page_faults_per_step"] for figures in values)
            for name, values in found.items() if values and "failed" not in values[-1]
        }  # fmt: skip
        write_result(
            options, "allocator", {**result, "medians": summary, "page_faults_per_step": faults, "measurements": found}, dtype=options.dtype
        )

    found = interleave(arms, num_repeats(options), lambda arm, _: measure(arm, job), keep)
    print(last_line(**{f"{name}_ratio": ratio for name, ratio in over_defaults(found).items()}))


if __name__ == "__main__":
    main()
