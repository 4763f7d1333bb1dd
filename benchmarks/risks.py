"""What each option against a risk of tuning does to the demo project: forgetting, memorising, style, likelihood.

    python benchmarks/risks.py FOLDER [NAME ...]

Each option is the demo's project, tuned without the demo's own options (`SETTINGS`), with these settings and nothing else changed; the
base is the only other arm. What is finished in FOLDER is not done again. Prints a Markdown table, that of docs/guides/risks.md.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from giong import samples
from giong.cli.demo import make_demo_project
from giong.config import load, with_settings
from giong.engine.early_stopping import recalled_share
from giong.jobs.supervisor import run_story
from giong.workflow.story import Story, ignore
from giong.workflow.training import plan_run, score_answers, tuned
from giong.workspace import Project, read_json, write_jsonl

LONG = {"train.num_epochs": 5}
STOPPING = {**LONG, "train.eval_steps": 9}
FULL = {"method.name": "full", "train.learning_rate": 8e-5}
CASES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "replay_share: 0.2": {"train.replay_share": 0.2},
    "replay_share: 0.5": {"train.replay_share": 0.5},
    "kl_weight: 0.2": {"train.kl_weight": 0.2},
    "kl_weight: 1": {"train.kl_weight": 1.0},
    "weight_decay: 0.1": {"train.weight_decay": 0.1},
    "lora_dropout: 0.1": {"method.lora_dropout": 0.1},
    "neftune_noise_alpha: 5": {"train.neftune_noise_alpha": 5.0},
    "5 epochs": LONG,
    "5 epochs, neftune_noise_alpha: 5": {**LONG, "train.neftune_noise_alpha": 5.0},
    "5 epochs, early_stopping_patience: 1, load_best_model_at_end": {
        **STOPPING, "train.early_stopping_patience": 1, "train.load_best_model_at_end": True,
    },
    "5 epochs, early_stopping_memorisation: 0.02": {**STOPPING, "train.early_stopping_memorisation": 0.02},
    "pseudo": {"train.pseudo": {"requests": "requests.jsonl", "rounds": 1}},
    "full": FULL,
    "full, l2_to_base: 100": {**FULL, "train.l2_to_base": 100.0},
    "full, kl_weight: 1": {**FULL, "train.kl_weight": 1.0},
}  # fmt: skip
SETTINGS = {
    "baselines.arms": ["base"], "evaluation.probes_per_kind": 0, "method.lora_r": 16, "train.num_epochs": 2, "train.learning_rate": 8e-4,
    "train.kl_weight": 0.0, "train.replay_share": 0.0,
}  # fmt: skip


def write(project: Project, settings: Mapping[str, Any]) -> None:
    """Settings by dotted name, put into giong.yaml."""
    config = with_settings(load(project.config_path), settings)
    project.config_path.write_text(yaml.safe_dump(config.model_dump(exclude_unset=True), sort_keys=False), encoding="utf-8")


def prepared(folder: Path) -> Project:
    """The demo project up to the base's answers, which all cases share."""
    project = make_demo_project(folder)
    write(project, SETTINGS)
    # What the other writers wrote on the same topics, to be put into the author's voice: requests that he never answered.
    others = [texts[0] for texts in samples.background_voices().values()] + [texts[1] for texts in samples.background_voices().values()]
    write_jsonl(folder / "requests.jsonl", [{"request": text} for text in others])
    run_story(project.root, ["import", "synth", "baseline"], ignore)
    return project


def measure(first: Project, name: str, settings: Mapping[str, Any]) -> list[str]:
    """The row of one case."""
    root = first.root.parent / name.replace(" ", "_").replace(":", "").replace(",", "")
    if not root.is_dir():
        shutil.copytree(first.root, root)
    project = Project(root)
    if settings:
        write(project, settings)
    run_story(root, ["train", "eval"], ignore)
    arm = read_json(root / "evaluation.json")["evaluation"]["arms"][-1]
    gate = next(gate for gate in arm["gates"] if gate["name"] == "forgetting")
    style, gain = arm["style_gap_closed"], arm["likelihood"]["gain_nats_per_token"]
    story = Story(project, load(project.config_path))
    run = plan_run(story, 1.0)
    with tuned(story, run.artifact, run.name) as (local, adapter):
        shares = []
        for side in ("train", "test"):
            examples = story.examples_of(side)[:40]
            scores = score_answers(local, adapter, examples)
            nll = sum(score.nll for score in scores) / sum(len(score.logprobs) for score in scores)
            shares.append((recalled_share([torch.tensor(score.logprobs) for score in scores]), nll))
    (known, trained), (easy, unseen) = shares
    return [
        f"{gate['value']:+.3f}", f"{style['point']:.2f} [{style['low']:.2f}, {style['high']:.2f}]", f"{gain['point']:.3f}",
        f"{known - easy:+.2%}", f"{unseen - trained:+.3f}", str(run.results["num_steps"]), f"{run.results['seconds']:.0f}",
    ]  # fmt: skip


def main() -> None:
    folder, *names = sys.argv[1:]
    first = prepared(Path(folder) / "first")
    head = ["settings", "forgetting", "style gap closed", "gain", "by heart", "trained minus unseen", "steps", "seconds"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for name in names or CASES:
        print(f"| {' | '.join([name, *measure(first, name, CASES[name])])} |", flush=True)


if __name__ == "__main__":
    main()
