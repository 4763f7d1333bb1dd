"""Its being here puts this folder on the import path, so that every test finds `fake_teacher` and `tiny_models`.

Torch is imported inside the fixtures only: most tests run without it, and it costs seconds.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Before torch, transformers or huggingface_hub are imported: all three read these once.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
    os.environ[_name] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Some of the benchmarks' functions are tested, and some serve tests.
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
if shutil.which("nvidia-smi") is None:
    # Triton's kernels are interpreted where no GPU can run them; Triton reads this when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if TYPE_CHECKING:
    from giong.models.load import LoadedModel


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_folder("qwen2")` is the model folder of a family's twin, made once; keywords change its config."""
    import tiny_models
    import torch

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("tiny_models")
    made: dict[str, Path] = {}

    def folder(family: str, **changes: object) -> Path:
        name = "-".join([family, *(f"{key}={value}" for key, value in sorted(changes.items()))])
        if name not in made:
            made[name] = tiny_models.save_model(family, root / name, **changes)
        return made[name]

    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Callable[..., Path]) -> Callable[..., LoadedModel]:
    """`tiny_model("qwen2")` is a fresh copy of a family's twin, loaded as giong loads a user's folder."""
    from giong.config import ModelConfig
    from giong.models.load import load_model

    def load(family: str, *, dtype: str = "float32", **changes: object) -> LoadedModel:
        import torch

        return load_model(ModelConfig(name_or_path=str(tiny_folder(family, **changes))), dtype=getattr(torch, dtype))

    return load
