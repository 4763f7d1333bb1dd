"""The files by which sentence-transformers knows how a folder of transformers turns a text into a vector."""

from __future__ import annotations

from pathlib import Path

from giong.workspace import write_json

MODES = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}


def write_pooling(folder: Path, *, width: int, pooling: str, max_seq_length: int) -> None:
    """Beside a saved model: pooled by `pooling`, then brought to length 1."""
    kinds = ("Transformer", "Pooling", "Normalize")
    paths = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(zip(kinds, paths))
    ]
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_seq_length, "do_lower_case": False})
    write_json(
        folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **{mode: name == pooling for name, mode in MODES.items()}}
    )
    (folder / "2_Normalize").mkdir(exist_ok=True)
