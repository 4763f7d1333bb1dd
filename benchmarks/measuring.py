"""Running measurements: one process each, arms interleaved, medians, and results that say what machine they come from.

This side never imports torch: a child process on Linux begins with its parent's peak memory, so the parent stays small.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from recording import Job
from shapes import BUNDLED, CASES, LORA_R, MIXES, SHAPES, Case, RowMix

from giong.jobs.supervisor import ALLOCATOR
from giong.sizing.hardware import this_machine
from giong.workspace import content_hash, read_json, write_json

HERE = Path(__file__).parent
ROOT = HERE.parent
BUILD = ROOT / "build"
RESULTS = HERE / "results"
MAX_TOKENS_PER_PACK = {"cpu": 2048, "cuda": 16384}
"""Tokens per forward pass, for giong's packs and for a peer's: the default of giong's `train.max_tokens_per_pack` on a CPU."""

DTYPES = {"bfloat16": "bf16", "float32": "fp32"}
"""Number formats of the weights, and how they are called for short."""

LAST_WORDS = 2000

WITHOUT_TRITON = (
    "import os, runpy, sys; sys.modules['triton'] = None; sys.argv.pop(0); "
    "sys.path[0] = os.path.dirname(sys.argv[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
)
"""Runs a script as beside a torch for CPUs, which comes without Triton: the tests have it installed, and torch would import it (75 MB)."""


@dataclass(frozen=True)
class Arm:
    """One way of training: which Python runs which script, with which settings and environment variables."""

    name: str
    script: str
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    python: Path = Path(sys.executable)


GIONG = Arm("giong", "giong_arm.py", environment=dict(ALLOCATOR))
"""With the allocator settings that giong's supervisor gives its workers: that is what its user gets without doing anything."""


TRAINING_OPTIONS: dict[str, dict[str, Any]] = {
    "device": {"choices": ("auto", "cpu", "cuda"), "default": "auto", "help": "auto: a GPU where torch sees one"},
    "dtype": {"choices": ("auto", *DTYPES), "default": "auto", "help": "of all arms; auto: what this device multiplies faster"},
    "set": {
        "action": "append", "default": [], "metavar": "NAME=VALUE",
        "help": "a setting of giong's section `train`, e.g. max_tokens_per_pack=4096",
    },
}  # fmt: skip


def parser(
    description: str | None, *, cases: Sequence[str], default: str, repeats: int | None = None, honours: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """The options that every benchmark has, `--repeats` where processes are repeated, and those of `TRAINING_OPTIONS` that a script honours."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--case", default=default, choices=cases, metavar="CASE", help=f"one of {', '.join(cases)} (default {default})")
    made.add_argument("--quick", action="store_true", help="little work, once: shows that it runs; written to NAME-CASE-quick.json")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (default benchmarks/results)")
    if repeats is not None:
        made.add_argument("--repeats", type=int, help=f"processes per arm (default {repeats}, with --quick 1)")
    for name in honours:
        made.add_argument(f"--{name}", **TRAINING_OPTIONS[name])
    made.set_defaults(full_repeats=repeats)
    return made


def num_repeats(options: argparse.Namespace) -> int:
    return options.repeats or (1 if options.quick else options.full_repeats)


def train_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The `--set` options as values. Exits with a sentence where one has no "="."""
    settings = {}
    for given in options.set:
        name, equals, value = given.partition("=")
        if not equals:
            sys.exit(f"--set {given}: write NAME=VALUE")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings


def answer_of(question: str, python: Path | str = sys.executable) -> str:
    """The last line that a program prints, run in a process of its own: importing torch here would make every later child's peak larger."""
    done = subprocess.run([str(python), "-c", question], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def torch_device(python: Path | str = sys.executable) -> str:
    """The device that the torch of an environment sees: "cuda" or "cpu"."""
    return answer_of("import torch; print('cuda' if torch.cuda.is_available() else 'cpu')", python)


def choose_device(asked: str, case: Case | None = None) -> str:
    """The device ("cpu" or "cuda") to measure on. Exits with a sentence where a case needs what is not there."""
    device = "cpu" if asked == "cpu" else torch_device()
    if asked == "cuda" and device != "cuda":
        sys.exit("--device cuda: torch sees no GPU here, so nothing was measured.")
    if case and case.needs_cuda and device != "cuda":
        sys.exit(f"{case.name} needs a GPU and torch sees none here: nothing was measured. The script is ready for one.")
    return device


def choose_dtype(asked: str, device: str) -> str:
    """The number format to measure in: bf16 on a GPU, and on a CPU what it multiplies faster."""
    if asked != "auto" or device == "cuda":
        return "bfloat16" if asked == "auto" else asked
    question = (
        "import time, torch\n"
        "def seconds(dtype):\n"
        "    a, b = (torch.ones(1024, 1024, dtype=dtype) for _ in range(2))\n"
        "    times = []\n"
        "    for _ in range(6):\n"
        "        started = time.perf_counter(); a @ b; times.append(time.perf_counter() - started)\n"
        "    return min(times)\n"
        f"print(min({list(DTYPES)}, key=lambda name: seconds(getattr(torch, name))))"
    )
    return answer_of(question)


def model_folder(shape: str, **changes: Any) -> tuple[Path, dict[str, Any]]:
    """(folder, config) of a shape's model, made on first use under build/. `changes` overrides numbers of the shape."""
    if shape == BUNDLED:
        import giong

        folder = Path(giong.__file__).parent / "models" / "bundled"
    else:
        config = SHAPES[shape] | changes
        folder = BUILD / "benchmark-models" / f"{shape}-{content_hash(config)[:8]}"
        if not (folder / "config.json").is_file():
            _run([sys.executable, HERE / "random_weights.py", folder, json.dumps(config)], clean_environment())
    return folder, read_json(folder / "config.json")


def job_of(case: Case, device: str, **changes: Any) -> Job:
    """What a process trains in this case; steps and settings are the arm's to say."""
    folder, config = model_folder(case.shape)
    values: dict[str, Any] = {
        "model": str(folder), "vocab_size": config["vocab_size"], "method": case.method, "lora_r": LORA_R, "mix": MIXES[case.mix],
        "device": device, "max_tokens_per_pack": MAX_TOKENS_PER_PACK[device], "num_warmup_steps": 1, "num_steps": 1,
    }  # fmt: skip
    return Job(**values | changes)


def clean_environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """This environment without allocator settings, offline and quiet, and `changes`."""
    allocator = ("MALLOC_", "LD_PRELOAD", "GLIBC_TUNABLES", "MIMALLOC_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(allocator)}
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return kept | quiet | dict(changes or {})


def _run(command: Sequence[Any], environment: Mapping[str, str]) -> None:
    """Raises RuntimeError with the process's last words where it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=dict(environment), check=False)
    if done.returncode:
        killed = " (killed, most likely for memory)" if done.returncode == -9 else ""
        raise RuntimeError(f"exit code {done.returncode}{killed}: {(done.stderr or done.stdout).strip()[-LAST_WORDS:]}")


def measure(arm: Arm, job: Job) -> dict[str, Any]:
    """The figures of one process, or {"failed": reason}: an arm that runs out of memory is a result too."""
    environment = clean_environment(arm.environment)
    if arm.python != Path(sys.executable):
        # A peer's environment must not find this one's packages.
        environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as folder:
        task, result = Path(folder) / "job.json", Path(folder) / "result.json"
        job.write(task)
        try:
            started_by = ["-c", WITHOUT_TRITON] if job.device == "cpu" else []
            _run([arm.python, *started_by, HERE / arm.script, task, result], environment)
        except RuntimeError as error:
            return {"failed": str(error)}
        return read_json(result)


def interleave(
    arms: Sequence[Arm], repeats: int, measure_arm: Callable[[Arm, int], dict[str, Any]], after_round: Callable[[dict], None]
) -> dict[str, list[dict[str, Any]]]:
    """`repeats` rounds over all arms, so that a machine that slows down slows all of them. An arm that failed is not tried again."""
    found: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}
    for round_number in range(repeats):
        for arm in arms:
            if any("failed" in figures for figures in found[arm.name]):
                continue
            figures = measure_arm(arm, round_number)
            found[arm.name].append(figures)
            said = figures.get("failed", "")[:200] or describe(figures)
            print(f"[{round_number + 1}/{repeats}] {arm.name}: {said}", file=sys.stderr, flush=True)
            after_round(found)
    return found


def describe(figures: Mapping[str, Any]) -> str:
    share = figures["roofline"]["share"] if "roofline" in figures else None
    said = f", {share:.0%} of the matrix rate" if share is not None else ""
    if share is not None and share > 1:
        said += " (more than is possible: the machine was busy with something else while the rate was measured)"
    return f"{figures['tokens_per_second']:.1f} tokens/s, peak {figures['peak_memory_bytes'] / 1e9:.2f} GB{said}"


def medians(measurements: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Median speed and peak memory (and roofline share) of an arm's processes; None where it failed.

    A share above 1 cannot be: something else was running while the rate was measured, and no share is given then.
    """
    good = [figures for figures in measurements if "failed" not in figures]
    if not good:
        return None
    found = {name: median(figures[name] for figures in good) for name in ("tokens_per_second", "peak_memory_bytes")}
    shares = [figures["roofline"]["share"] for figures in good if "roofline" in figures]
    if len(shares) == len(good) and max(shares) <= 1:
        found["roofline_share"] = median(shares)
    return found


def busy_cores(seconds: float = 2.0) -> float | None:
    """Cores that others keep busy (or that a hypervisor takes away), on average over so many seconds from now; None where the system
    does not say. The load average would still count the benchmark before this one."""
    counters = Path("/proc/stat")
    if not counters.is_file():
        return None

    def ticks() -> int:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, counters.read_text(encoding="ascii").split("\n")[0].split()[1:9])
        return user + nice + system + irq + softirq + steal

    before, started = ticks(), time.monotonic()
    time.sleep(seconds)
    return (ticks() - before) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - started)


def describe_machine(device: str) -> dict[str, Any]:
    """Processor, flags that decide which number format is fast, cores, memory, and the versions that matter."""
    machine = this_machine()
    busy = busy_cores()
    if busy is not None and busy > machine.num_cores / 4:
        print(f"this machine is busy ({busy:.1f} of {machine.num_cores} cores): do not trust these figures", file=sys.stderr)
    packages = ("torch", "transformers", "peft", "numpy", "tokenizers")
    described = {
        "cpu": machine.cpu_model, "cores": machine.num_cores, "flags": sorted(machine.cpu_flags),
        "amx": bool(machine.cpu_flags & {"amx_bf16", "amx_tile"}), "avx512_bf16": "avx512_bf16" in machine.cpu_flags,
        "memory_bytes": machine.total_memory_bytes, "system": platform.system(), "libc": " ".join(platform.libc_ver()),
        "busy_cores_at_start": busy, "python": platform.python_version(),
        "device": device, "packages": {name: package_version(name) for name in packages},
    }  # fmt: skip
    if device == "cuda":
        answer = answer_of("import torch; p = torch.cuda.get_device_properties(0); print(p.name, p.total_memory, sep='|')").split("|")
        described["gpu"], described["gpu_memory_bytes"] = answer[0], int(answer[1])
    return described


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def write_result(options: argparse.Namespace, name: str, result: Mapping[str, Any], *, dtype: str | None) -> Path:
    """Write results/NAME-CASE.json whole or not at all; a quick run's goes beside it and never replaces it, nor does one in fp32.

    `dtype` is the number format that was measured in, None where nothing was multiplied.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"{dtype} is no number format that a measurement is made in")
    fp32 = "-fp32" if dtype == "float32" else ""
    path = options.results / f"{name}-{options.case}{fp32}{'-quick' if options.quick else ''}.json"
    write_json(path, {"benchmark": name, "case": options.case, "quick": options.quick, "dtype": dtype, **result})
    return path


def last_line(**values: float | str | None) -> str:
    """key=value pairs; what could not be measured says so."""
    return " ".join(f"{key}={_short(value)}" for key, value in values.items())


def _short(value: float | str | None) -> str:
    if value is None:
        return "not_measured"
    return value if isinstance(value, str) else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def peer_batch_rows(mix: RowMix, max_tokens_per_pack: int, default: int = 8) -> int:
    """Rows per pass of an unpacked peer: its own default, or what the token budget holds where rows are long."""
    return max(1, min(default, mix.num_rows, max_tokens_per_pack // ((mix.min_tokens + mix.max_tokens) // 2)))


def find_library(name: str) -> str | None:
    """The path of a shared library that can be preloaded, or None."""
    patterns = ("/usr/lib/*/{0}.so*", "/usr/lib/{0}.so*", "/usr/lib64/{0}.so*", "/usr/local/lib/{0}.so*", f"{sys.prefix}/lib/{{0}}.so*")
    found = sorted(path for pattern in patterns for path in glob.glob(pattern.format(f"lib{name}")))
    return found[0] if found else None


def known_cases(*, cpu_only: bool = False) -> list[str]:
    return [name for name, case in CASES.items() if not (cpu_only and case.needs_cuda)]
