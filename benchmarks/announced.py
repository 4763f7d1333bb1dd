"""What the runs of a whole project announce, against what they take: time and the peak of the worker's memory.

    python benchmarks/announced.py [--quick] [--repeats N]

The demo's story as `giong run` walks it, up to its training, in one worker: what earlier steps leave in the process counts, and rows are of
as many lengths as the author's texts. `estimates.py` is about single steps. Writes benchmarks/results/announced-demo.json and ends with the
largest errors.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from estimates import TOLERANCES as OF_A_STEP
from measuring import describe_machine, last_line, num_repeats, parser, write_result

from giong.cli.demo import make_demo_project
from giong.contracts import Event
from giong.jobs.supervisor import run_story
from giong.workspace import read_json

TOLERANCES = {"peak_memory_bytes": OF_A_STEP["peak_memory_bytes"], "seconds": OF_A_STEP["tokens_per_second"]}
"""What is promised."""
STEPS = ("import", "synth", "baseline", "size", "train")
QUICK_STEPS = ("import", "synth", "train")


def runs_of(folder: Path, steps: tuple[str, ...]) -> list[dict[str, Any]]:
    """Walk the demo in `folder`; what each of its runs announced and took, in the order of their sizes."""
    project = make_demo_project(folder)

    def say(event: Event) -> None:
        if event.kind == "stage_started":
            print(f"  {event.stage}", flush=True)

    run_story(folder, steps, say)
    found = []
    for run in project.list_runs():
        record, results = read_json(run / "run.json"), read_json(run / "results.json")
        taken = {name: results[name] for name in results["announced"]}
        errors = {name: results["announced"][name] / taken[name] - 1 for name in taken}
        found.append({
            "num_rows": record["num_rows"], "dtype": record["settings"]["dtype"], "announced": results["announced"], "taken": taken, "errors": errors,
        })  # fmt: skip
    return sorted(found, key=lambda run: run["num_rows"])


def print_run(run: dict[str, Any]) -> None:
    """One line: announced, taken, error."""
    memory, seconds = ([part[name] for part in (run["announced"], run["taken"], run["errors"])] for name in TOLERANCES)
    print(
        f"{run['num_rows']:4d} rows  {memory[0] / 1e9:.2f} {memory[1] / 1e9:.2f} GB {memory[2]:+.1%}   {seconds[0]:.1f} {seconds[1]:.1f} s {seconds[2]:+.1%}",
        flush=True,
    )


def main() -> None:
    options = parser(__doc__, cases=["demo"], default="demo", repeats=1).parse_args()
    runs: list[dict[str, Any]] = []
    machine = describe_machine("cpu")
    for _ in range(num_repeats(options)):
        with tempfile.TemporaryDirectory() as folder:
            found = runs_of(Path(folder) / "demo", QUICK_STEPS if options.quick else STEPS)
        for run in found:
            print_run(run)
        runs += found
    write_result(options, "announced", {"machine": machine, "tolerances": TOLERANCES, "runs": runs}, dtype=runs[-1]["dtype"])
    worst = {name: max((run["errors"][name] for run in runs), key=abs) for name in TOLERANCES}
    print(last_line(memory_error=worst["peak_memory_bytes"], time_error=worst["seconds"]))


if __name__ == "__main__":
    main()
