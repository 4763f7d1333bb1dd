"""Whether a model folder can be loaded safely, checked by hand before transformers sees it.

Free of torch: a wrong path is told at once, and not after the seconds of an import or the money of a synthesis.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from giong.config import BUNDLED, ModelConfig
from giong.errors import ModelError

BUNDLED_PATH = Path(__file__).parent / "bundled"


def resolve(name_or_path: str) -> str:
    """The bundled base's folder for its name; otherwise the name or path itself."""
    return str(BUNDLED_PATH) if name_or_path == BUNDLED else name_or_path


def looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).expanduser().exists()


def check_model(config: ModelConfig) -> Path | None:
    """The folder that the settings name, checked; None for a hub model. Raises ModelError, with what to do."""
    source = resolve(config.name_or_path)
    if not looks_like_path(source):
        return None
    folder = Path(source).expanduser()
    check_folder(folder)
    return folder


def check_folder(folder: Path, setting: str = "model:") -> None:
    """Raise ModelError, with what to do, where a folder cannot be loaded safely; `setting` is what names it."""
    if not folder.exists():
        raise ModelError(
            "There is no model at this path", place=str(folder), remedy=f"Correct `{setting}`, or use `{BUNDLED}` to try things out."
        )
    if not (folder / "config.json").is_file():
        raise ModelError(
            "This folder has no config.json", place=str(folder), remedy=f"Point `{setting}` at a model folder as transformers saves it."
        )
    for path in (folder / "config.json", folder / "tokenizer.json", folder / "tokenizer_config.json"):
        if path.is_file():
            _check_json_object(path)
    if not list(folder.glob("*.safetensors")):
        pickles = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        if pickles:
            raise ModelError(
                f"This model has only pickle weights ({pickles[0]}), which can run any code when loaded", place=str(folder),
                remedy="Use a version with .safetensors files, or convert it on a machine that you can spare.",
            )  # fmt: skip
        raise ModelError("This folder has no .safetensors weights", place=str(folder), remedy="Fetch the model again.")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelError(
            "This folder has no tokenizer",
            place=str(folder),
            remedy="Copy tokenizer.json (and tokenizer_config.json) of the same model into it.",
        )


def entailment_label(id2label: Mapping[Any, str]) -> int | None:
    """Which output of a model for natural language inference says that the second text follows from the first; None where none does."""
    return next((int(index) for index, name in id2label.items() if name.lower() in ("entailment", "entails", "entail")), None)


def _check_json_object(path: Path) -> None:
    try:
        if isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
            return
        reason = "it holds no mapping"
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        reason = str(error)
    raise ModelError(f"{path.name} is not valid JSON ({reason})", place=str(path), remedy="Fetch the model again.")
