"""Does the allocator setting of the workers pay? Training tokens per second of the bundled base, three settings, interleaved.

    python benchmarks/allocator.py [--repeats 5]

Each measurement is a process of its own, because glibc reads its settings once. Writes benchmarks/results/allocator.json and ends
with one line of key=value pairs: ratios of medians over glibc's defaults.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median

from giong.jobs.supervisor import ALLOCATOR

CASES = {
    "glibc_defaults": {},
    "threshold_refused": {"MALLOC_MMAP_THRESHOLD_": str(4 * 1024**3), "MALLOC_TRIM_THRESHOLD_": str(8 * 1024**3)},
    "giong": ALLOCATOR,
}
MEASURE = """
import resource, torch
from giong.config import ModelConfig
from giong.models.load import load_model
from giong.workflow import probing
probing.PROBE_TOKENS = 2048
loaded = load_model(ModelConfig(), dtype=torch.bfloat16)
speed = probing.training_speed(loaded, repeats=6)
print(speed, resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def measure(settings: dict[str, str]) -> tuple[float, int]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | settings
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, env=environment, check=True)
    speed, faults = done.stdout.split()[-2:]
    return float(speed), int(faults)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in CASES}
    for _ in range(arguments.repeats):
        for name, settings in CASES.items():
            found[name].append(measure(settings))
    medians = {name: median(speed for speed, _ in values) for name, values in found.items()}
    result = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "libc": " ".join(platform.libc_ver())},
        "tokens_per_second": {name: [round(speed, 1) for speed, _ in values] for name, values in found.items()},
        "page_faults": {name: [faults for _, faults in values] for name, values in found.items()},
        "medians": {name: round(value, 1) for name, value in medians.items()},
    }
    path = Path(__file__).parent / "results" / "allocator.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    base = medians["glibc_defaults"]
    print(" ".join(f"{name}_ratio={value / base:.2f}" for name, value in medians.items()))


if __name__ == "__main__":
    main()
