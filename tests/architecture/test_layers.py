"""The house rules of ARCHITECTURE.md as a test: who imports whom, what stays free of torch, how large files and functions get.

The rules are read from the source with `ast`, so an import inside a function counts too; only what no reader of the source can
see is tested by importing. The allow-lists below may only shrink.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"

ROWS = {
    "contracts": 0, "errors": 0,
    "config": 1, "workspace": 1, "clients": 1,
    "data": 2, "sizing": 2, "samples": 2, "models": 2,
    "providers": 3, "journal": 3, "methods": 3, "objectives": 3, "generation": 3,
    "evaluation": 4, "baselines": 4, "engine": 4, "export": 4, "serving": 4,
    "workflow": 5, "voice": 5,
    "jobs": 6, "worker": 6,
    "cli": 7, "server": 7, "project": 7, "__main__": 8, "__init__": 8,
}  # fmt: skip
TORCH_SIDE = {"models", "methods", "objectives", "generation", "engine", "export", "serving", "workflow", "voice", "worker"}
TORCH_LIBRARIES = {"torch", "transformers", "peft", "tokenizers", "safetensors"}
NEVER_IMPORTED_BY = {"engine": {"methods", "objectives", "generation", "evaluation"}}
SAME_ROW = {("clients", "config"), ("clients", "workspace"), ("cli", "server"), ("cli", "project"), ("models", "sizing")}
OUTSIDE = {"tests", "examples", "benchmarks"}
VAGUE_NAMES = {"utils", "util", "common", "misc", "helpers", "helper"}
MAX_FILE_LINES, ASKED_FILE_LINES, MAX_FUNCTION_LINES = 600, 400, 100
LONGER_FILES: dict[str, int] = {}
LONGER_FUNCTIONS: dict[str, int] = {}


def imports(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a module of `package`, also inside functions and by constant string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            anchor = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*anchor, *filter(None, [node.module])])
            # `from giong import data` imports giong.data, and `from giong import run` the root package.
            yield from ((node.lineno, f"{base}.{alias.name}" if base == "giong" else base) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__", "run_module") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def import_problem(package: str, name: str) -> str:
    """Why a module of `package` may not import `name`; empty if it may."""
    top, _, rest = name.partition(".")
    if top in OUTSIDE:
        return f"src imports {top}"
    if package == "__init__":
        return "giong/__init__ imports a torch library" if top in TORCH_LIBRARIES else ""
    if top in TORCH_LIBRARIES:
        return "" if package in TORCH_SIDE else f"torch-free {package} imports {name}"
    if top != "giong" or name == "giong.__version__":
        return ""
    target = rest.partition(".")[0]
    target = target if target in ROWS else "__init__"
    if target == package:
        return ""
    if target in TORCH_SIDE and package not in TORCH_SIDE:
        return f"torch-free {package} imports {target} of the torch side"
    if target in NEVER_IMPORTED_BY.get(package, ()):
        return f"{package} imports {target}, which is handed in"
    if ROWS[target] >= ROWS[package] and (package, target) not in SAME_ROW:
        return f"{package} (row {ROWS[package]}) imports {target} (row {ROWS[target]})"
    return ""


def violations(src: Path) -> list[str]:
    """Every broken rule of a source tree, as "file:line: sentence"."""
    found: list[str] = []
    for path in sorted((src / "giong").rglob("*.py")):
        name, text = path.relative_to(src).as_posix(), path.read_text(encoding="utf-8")
        tree, parts = ast.parse(text), [*path.relative_to(src).with_suffix("").parts]
        if vague := VAGUE_NAMES.intersection(parts):
            found.append(f"{name}:1: a module called {vague.pop()}")
        if not ast.get_docstring(tree):
            found.append(f"{name}:1: no docstring")
        num_lines = text.count("\n")
        if num_lines > LONGER_FILES.get(name, MAX_FILE_LINES):
            found.append(f"{name}:1: {num_lines} lines")
        elif num_lines > ASKED_FILE_LINES:
            warnings.warn(f"{name} has {num_lines} lines: can it be two files?", stacklevel=1)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > LONGER_FUNCTIONS.get(f"{name}:{node.name}", MAX_FUNCTION_LINES):
                    found.append(f"{name}:{node.lineno}: function {node.name} has {length} lines")
        if parts[1] not in ROWS:
            found.append(f"{name}:1: {parts[1]} has no row in the import table")
            continue
        problems = ((line, import_problem(parts[1], imported)) for line, imported in imports(tree, parts[:-1]))
        found.extend(f"{name}:{line}: {problem}" for line, problem in problems if problem)
    return found


def torch_after_importing_the_torch_free_side(src: Path) -> list[str]:
    """Torch libraries that are loaded after one process has imported every torch-free module."""
    modules = []
    for path in sorted((src / "giong").rglob("*.py")):
        parts = path.relative_to(src).with_suffix("").parts
        if parts[1] not in TORCH_SIDE and parts[-1] != "__main__":
            modules.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    code = f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
    code += f"print(*sorted({TORCH_LIBRARIES!r} & set(sys.modules)))"
    return _python(src, "-c", code).stdout.split()


def torch_in_command_line_help(src: Path) -> list[str]:
    """Torch libraries that `python -m giong.cli --help` imports."""
    timings = _python(src, "-X", "importtime", "-m", "giong.cli", "--help").stderr
    return sorted({name for name in re.findall(r"\|\s+([A-Za-z_]\w*)", timings) if name in TORCH_LIBRARIES})


def _python(src: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(src), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result


def test_the_house_keeps_its_rules() -> None:
    assert violations(SRC) == []


def test_the_torch_free_side_imports_without_torch() -> None:
    assert torch_after_importing_the_torch_free_side(SRC) == []


def test_help_imports_no_torch() -> None:
    if not ((SRC / "giong/cli.py").exists() or (SRC / "giong/cli/__init__.py").exists()):
        pytest.skip("giong.cli does not exist")
    assert torch_in_command_line_help(SRC) == []


def plant(src: Path, path: str, body: str, docstring: str = '"""A module."""\n') -> None:
    target = src / "giong" / path
    target.parent.mkdir(parents=True, exist_ok=True)
    for folder in target.relative_to(src).parents[:-1]:
        (src / folder / "__init__.py").write_text('"""A package."""\n')
    target.write_text(docstring + body)


LONG_FUNCTION = "def long():\n" + "    pass\n" * 100
ALLOWED = {
    "engine/a.py": "import torch\nfrom giong.contracts import Event\nfrom giong.models.load import load\n",
    "workflow.py": "from giong import engine, methods\nfrom giong.evaluation.run import evaluate\n",
    "jobs/start.py": "import subprocess, sys\nsubprocess.run([sys.executable, '-m', 'giong.worker'])\n",
    "clients/a.py": "from giong.config.remote import RemoteModelConfig\nfrom . import spend\n",
    "providers/a.py": "from giong.clients.spend import SpendLedger\nfrom giong.sizing.prices import PriceTable\n",
    "data/a.py": "text = 'import torch'  # import torch\n" + "\n".join("x = 1" for _ in range(300)),
}
FORBIDDEN = [
    ("data/a.py", "import torch\n", "torch-free data imports torch"),
    ("jobs/a.py", "def start():\n    from giong.worker import main\n", "torch-free jobs imports worker of the torch side"),
    ("evaluation/a.py", "from giong import models\n", "torch-free evaluation imports models"),
    ("cli/a.py", "import importlib\nimportlib.import_module('giong.workflow')\n", "torch-free cli imports workflow"),
    ("providers/a.py", "from giong.workflow.story import Story\n", "torch-free providers imports workflow of the torch side"),
    ("samples/a.py", "from safetensors.numpy import load_file\n", "torch-free samples imports safetensors"),
    ("engine/a.py", "from giong.objectives.sft import sft\n", "engine imports objectives, which is handed in"),
    ("engine/a.py", "from ..generation import decode\n", "engine imports generation, which is handed in"),
    ("evaluation/a.py", "import giong.baselines.prompt\n", "evaluation (row 4) imports baselines (row 4)"),
    ("config/a.py", "from giong.data.split import split\n", "config (row 1) imports data (row 2)"),
    ("data/a.py", "from giong import run\n", "data (row 2) imports __init__ (row 8)"),
    ("sizing/a.py", "from tests.unit import fake\n", "src imports tests"),
    ("data/utils.py", "", "a module called utils"),
    ("data/misc/a.py", "", "a module called misc"),
    ("elsewhere/a.py", "", "elsewhere has no row"),
    ("data/a.py", "x = 1\n" * 601, "602 lines"),
    ("data/a.py", LONG_FUNCTION, "function long has 101 lines"),
]  # fmt: skip


def test_allowed_imports_pass(tmp_path: Path) -> None:
    for path, body in ALLOWED.items():
        plant(tmp_path, path, body)
    assert violations(tmp_path) == []


@pytest.mark.parametrize(("path", "body", "expected"), FORBIDDEN, ids=[row[2] for row in FORBIDDEN])
def test_a_planted_error_is_found(tmp_path: Path, path: str, body: str, expected: str) -> None:
    plant(tmp_path, path, body)
    found = violations(tmp_path)
    assert found, "nothing found"
    assert all(expected in sentence for sentence in found), found


def test_a_missing_docstring_is_found(tmp_path: Path) -> None:
    plant(tmp_path, "data/a.py", "x = 1\n", docstring="")
    assert violations(tmp_path) == ["giong/data/a.py:1: no docstring"]


def test_a_hidden_import_of_torch_is_found(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("")
    plant(tmp_path, "data/a.py", "__import__('to' + 'rch')\n")
    plant(tmp_path, "cli/__main__.py", "from giong.data import a\n")
    assert violations(tmp_path) == []
    assert torch_after_importing_the_torch_free_side(tmp_path) == ["torch"]
    assert torch_in_command_line_help(tmp_path) == ["torch"]
