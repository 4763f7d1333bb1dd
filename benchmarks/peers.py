"""The peers' environments: TRL, PEFT and datasets in one of their own, LLaMA-Factory in another, so that giong's stays as it is.

Versions are those of constraints.txt where it names them, so both sides run the same torch and transformers; LLaMA-Factory's own pins
exclude those, so it shares the torch alone. What cannot be installed is not an error: the reason is kept and goes into every result.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measuring import ROOT, Arm, answer_of, torch_device

from giong.jobs.supervisor import ALLOCATOR
from giong.workspace import read_json, write_json

NEEDED = ("torch", "transformers", "trl", "peft", "datasets")
CONSTRAINTS = ROOT / "constraints.txt"
TRY_SECONDS = 600


@dataclass(frozen=True)
class Peers:
    """`python` runs the peers (None where they could not be installed); `notes` say what is missing and why."""

    python: Path | None
    versions: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def ensure_peers(path: Path, device: str) -> Peers:
    """Make TRL's environment on first use, complete it on the first use on another device; then it is used as it is."""
    found = _environment(path, device, "trl", NEEDED, CONSTRAINTS)
    if found.python is None:
        return found
    # What can be had differs between devices, so the notes of one say nothing about the other.
    record = path / f"peers-{device}.json"
    if not record.is_file():
        write_json(record, _try_others(found.python, device))
    return Peers(found.python, _versions(found.python), read_json(record))


def ensure_llamafactory(path: Path, device: str) -> Peers:
    """Make LLaMA-Factory's environment on first use; it installs beside the torch of constraints.txt, not beside the transformers."""
    pins = path / "torch.txt"
    if not pins.is_file():
        path.mkdir(parents=True, exist_ok=True)
        torch = next(line for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines() if line.startswith("torch=="))
        pins.write_text(f"{torch}\n", encoding="utf-8")
    # Version 0.9 is the first that knows a transformers of this generation; pip would otherwise fall back to one from years before,
    # which installs and then cannot be imported.
    return _environment(path, device, "llamafactory", ("llamafactory>=0.9",), pins)


def _environment(path: Path, device: str, name: str, packages: Sequence[str], pins: Path) -> Peers:
    python = path.absolute() / "bin" / "python"
    if not python.is_file():
        print(f"making the environment of {name} in {path}", file=sys.stderr, flush=True)
        venv.create(path, with_pip=True)
    if any(package.partition(">")[0] not in _versions(python) for package in packages) and (
        reason := _install(python, *packages, pins=pins)
    ):
        return Peers(None, _versions(python), {name: f"could not be installed: {reason}"})
    versions = _versions(python)
    if device == "cuda" and torch_device(python) != "cuda":
        # A torch for CPUs alone satisfies the same pin, so pip would leave it as it is.
        return Peers(None, versions, {name: f"torch {versions['torch']} of {path} sees no GPU; remove that folder to have it made anew"})
    return Peers(python, versions)


def _try_others(python: Path, device: str) -> dict[str, str]:
    if device != "cuda":
        return {"unsloth": "needs CUDA", "liger-kernel": "its kernels need CUDA"}
    notes = {"unsloth": "has no arm here"}
    if reason := _install(python, "liger-kernel", pins=CONSTRAINTS):
        notes["liger-kernel"] = f"could not be installed: {reason}"
    return notes


def _install(python: Path, *packages: str, pins: Path) -> str:
    """Empty when pip succeeds, else pip's own reason in one line."""
    command = [python, "-m", "pip", "install", "-c", pins, *packages]
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=TRY_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"pip found no answer in {TRY_SECONDS} seconds"
    if done.returncode == 0:
        return ""
    return reason_of(done.stdout + "\n" + done.stderr) or f"pip ended with exit code {done.returncode}"


def reason_of(text: str) -> str:
    """What pip says is in the way: the conflicting requirement where it names one, else its first error."""
    lines = [line.strip() for line in text.splitlines()]
    if "The conflict is caused by:" in lines:
        following = lines[lines.index("The conflict is caused by:") + 1 :]
        # pip lists every version that it tried and every pin; only the pin of the package that the first one names explains it.
        wanted = re.search(r"depends on ([\w.-]+)", following[0])
        pinned = next((line for line in following if wanted and line.startswith("The user requested") and f" {wanted[1]}==" in line), "")
        return f"{following[0]}; {pinned[:1].lower()}{pinned[1:]}".strip("; ")
    return next((line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")), "")


def _versions(python: Path) -> dict[str, str]:
    if not python.is_file():
        return {}
    # Of two of a name, the one that comes first is what is imported.
    code = "import importlib.metadata as m, json; print(json.dumps({d.name.lower(): d.version for d in reversed([*m.distributions()])}))"
    every = json.loads(answer_of(code, python))
    return {name: every[name] for name in (*NEEDED, "accelerate", "liger_kernel", "flash_attn", "llamafactory") if name in every}


def llamafactory_arms(peers: Peers, dtype: str, batch_rows: int) -> list[Arm]:
    """LLaMA-Factory as its documentation has it, without gradient checkpointing as everybody here."""
    settings = {"batch_rows": batch_rows, "disable_gradient_checkpointing": True, "bf16": dtype == "bfloat16"}
    return [Arm("llamafactory", "llamafactory_arm.py", settings, python=peers.python)] if peers.python else []


def trl_arms(peers: Peers, device: str, dtype: str, batch_rows: int) -> list[Arm]:
    """TRL as its user would run it, from its defaults to its fastest settings. The check needs the first."""
    if peers.python is None:
        return []

    def arm(name: str, settings: dict[str, Any], environment: dict[str, str] | None = None) -> Arm:
        return Arm(name, "trl_arm.py", settings, environment or {}, peers.python)  # type: ignore[arg-type]

    attention = {"attn_implementation": "flash_attention_2"} if device == "cuda" and "flash_attn" in peers.versions else {}
    plain: dict[str, Any] = {"model_init_kwargs": {"dtype": dtype, **attention}, "gradient_checkpointing": False}
    if dtype == "float32":
        # Its default is bf16 autocast, which this processor would compute more slowly.
        plain["bf16"] = False
    packed = {**plain, "packing": True}
    arms = [arm("trl-unpacked", {**plain, "batch_rows": batch_rows}), arm("trl-packed", packed)]
    if device == "cpu":
        arms.append(arm("trl-packed+malloc", packed, dict(ALLOCATOR)))
    elif "liger_kernel" in peers.versions:
        liger = {"use_liger_kernel": True}
        arms += [arm("trl-liger", {**plain, "batch_rows": batch_rows, **liger}), arm("trl-liger-packed", {**packed, **liger})]
    # Nothing set: fp32 weights, bf16 autocast, gradient checkpointing.
    return [*arms, arm("trl-default", {"batch_rows": batch_rows})]
