"""`giong doctor`: what is installed, which device and dtype is fastest here, what is missing and how to get it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import typer

NEEDED = ("torch", "transformers", "peft", "safetensors", "tokenizers", "scikit-learn", "fastapi", "openai")
OPTIONAL = {
    "bitsandbytes": ("4-bit weights", "pip install bitsandbytes"),
    "gguf": ("GGUF export", "pip install gguf"),
    "jsonschema": ("evaluation.json_schema", "pip install 'giong[schema]'"),
    "lm-eval": ("evaluation.lm_eval_tasks", "pip install 'giong[lm-eval]'"),
    "optuna": ("giong sweep", "pip install 'giong[sweep]'"),
}
# Runs where torch may be imported: prints one JSON object.
MEASURE = """
import json, time, torch
def rate(device, dtype, size):
    a = torch.randn(size, size, device=device).to(dtype); b = torch.randn(size, size, device=device).to(dtype)
    sync = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    for _ in range(3): a @ b
    sync(); started = time.perf_counter(); repeats = 0
    while time.perf_counter() - started < 0.4: a @ b; sync(); repeats += 1
    return 2 * size ** 3 * repeats / (time.perf_counter() - started) / 1e9
from giong.engine.devices import describe_engine
from giong.models.devices import device_name, resolve_device
device = resolve_device()
devices = ["cpu"] + (["cuda"] if device.type == "cuda" else [])
found = {f"{d} {str(t).removeprefix('torch.')}": round(rate(d, t, 1024 if d == "cpu" else 4096)) for d in devices for t in (torch.float32, torch.bfloat16)}
print(json.dumps({"gigaflops_per_second": found, "threads": torch.get_num_threads(), "mkldnn": torch.backends.mkldnn.is_available(),
    "device": device_name(device), "built_for_cuda": torch.version.cuda, "engine": describe_engine(device)}))
"""


def doctor() -> None:
    """Check the installation and the machine, and say what to do about what is missing."""
    from giong.sizing.hardware import this_machine
    from giong.sizing.units import format_bytes

    missing = []
    for name in NEEDED:
        try:
            typer.echo(f"ok        {name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
            typer.echo(f"MISSING   {name}: pip install {name}")
    for name, (purpose, command) in OPTIONAL.items():
        if find_spec(name.replace("-", "_")) is None:
            typer.echo(f"optional  {name} ({purpose}): {command}")
        else:
            typer.echo(f"ok        {name} ({purpose})")
    machine = this_machine()
    typer.echo(f"machine   {machine.cpu_model or 'unknown processor'}, {machine.num_cores} cores")
    typer.echo(f"memory    {format_bytes(machine.total_memory_bytes)} in all, {format_bytes(machine.available_memory_bytes)} free")
    typer.echo(f"disk      {format_bytes(shutil.disk_usage('.').free)} free here")
    if missing:
        raise typer.Exit(1)
    _say_speed()


def _say_speed() -> None:
    from giong.jobs.supervisor import ALLOCATOR, worker_environment

    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, env=worker_environment(), check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message"
        typer.echo(f"PROBLEM   torch does not start: {last}")
        raise typer.Exit(1)
    measured = json.loads(done.stdout.strip().splitlines()[-1])
    speeds = measured["gigaflops_per_second"]
    for name, speed in speeds.items():
        typer.echo(f"speed     {name}: {speed} GFLOP/s in matrix products")
    fastest = max(speeds, key=lambda name: speeds[name])
    typer.echo(f"fastest   {fastest}, {measured['threads']} threads (`giong run` measures it on your model and keeps the choice)")
    _say_engine(measured)
    typer.echo(f"allocator workers start with {', '.join(f'{name}={value}' for name, value in ALLOCATOR.items())}")


def _say_engine(measured: dict[str, Any]) -> None:
    """What a run would compute with, and what would be faster if it were there."""
    typer.echo(f"device    {measured['device']}")
    if measured["device"] == "cpu" and shutil.which("nvidia-smi"):
        reason = "cannot reach it" if measured["built_for_cuda"] else "was built for the CPU alone"
        typer.echo(f"PROBLEM   there is an NVIDIA driver, but torch {reason}: https://pytorch.org/get-started/locally names the command")
    for status, part, sentence in measured["engine"]:
        label = part if status == "ok" else status
        typer.echo(f"{label:<9} {sentence if status == 'ok' else f'{part}: {sentence}'}")
