"""`giong demo`: the whole story on the bundled base and the bundled sample author, in a few minutes on two cores."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

from giong.workspace import Project

NUM_TEST_REQUESTS = 40
SETTINGS = {
    "name": "giong-demo",
    "data": {
        "merge_paragraphs": False, "min_words": 50, "max_words": 160, "test_share": 0.25, "calibration_share": 0.15,
        "consent": {"author": "the bundled sample author (an invention)", "granted": True},
    },
    "synthesis": {"source": "recorded", "recorded": "recorded.jsonl"},
    "baselines": {"num_shots": 2, "likelihood": False},
    # Few shots, small pilots and no dropout: the demo has to fit into a few minutes on two cores. What keeps so small a base from losing
    # the request while it learns the voice is the pull towards itself (KL), and what keeps it from being bland the weight of rare words:
    # docs/decisions/0019-demo-settings.md.
    "sizing": {"pilot_shares": [0.0625, 0.125, 1.0]},
    "method": {"lora_r": 96, "lora_dropout": 0.0},
    "train": {
        "num_epochs": 2, "learning_rate": 8e-4, "kl_weight": 0.25, "surprise_weight": 1.0, "replay_share": 0.15, "max_tokens_per_pack": 1024,
    },
    "evaluation": {"max_requests": NUM_TEST_REQUESTS, "probes_per_kind": 3},
}  # fmt: skip


def make_demo_project(folder: Path) -> Project:
    """A project on the bundled sample author: documents as files, the recorded rewrites beside them."""
    from giong import samples
    from giong.project import init

    if not (folder / "giong.yaml").is_file():
        writing, _ = samples.write_author(folder)
        project = init(folder, sources=[writing], settings=SETTINGS)
        text = project.config_path.read_text(encoding="utf-8")
        # The folder may be moved or shown to others: its own writing is named relative to it.
        project.config_path.write_text(text.replace(str(writing.resolve()), "writing"), encoding="utf-8")
    return Project(folder)


def demo(
    folder: Annotated[Path, typer.Option(help="Where to make the demo project.")] = Path("giong-demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete an earlier demo first.")] = False,
) -> None:
    """Walk the whole story on bundled data: no key, no network, no GPU."""
    from giong.cli.results import show_results
    from giong.cli.story import perform
    from giong.contracts import RUN_STEPS

    if fresh and (folder / "giong.yaml").is_file():
        shutil.rmtree(folder)
    started = time.monotonic()
    project = make_demo_project(folder)
    perform(project.root, RUN_STEPS)
    show_results(project, with_samples=True)
    typer.echo(f"\nOne seed, {NUM_TEST_REQUESTS} test requests, {time.monotonic() - started:.0f} s. Base model: giong-tiny (bundled).")
    typer.echo(f"Try it: giong chat --project {folder}    giong serve --project {folder}")
