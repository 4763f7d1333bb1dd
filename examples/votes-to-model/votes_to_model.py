"""From votes to a better-aligned model, on the bundled base and the bundled sample author.

    python examples/votes-to-model/votes_to_model.py --folder votes-demo [--tiny]

A stopped run goes on where it was. The votes are simulated, by a rule that the README states.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import giong
from giong import samples

RATER, CONSENT = "simulated", "Nobody was asked: the votes are made by a rule (examples/votes-to-model/README.md)."
SETTINGS: dict[str, dict[str, Any]] = {
    "data": {
        "merge_paragraphs": False, "min_words": 50, "max_words": 160, "test_share": 0.4, "calibration_share": 0.15,
        "consent": {"author": "the bundled sample author (an invention)", "granted": True},
    },
    "synthesis": {"source": "recorded", "recorded": "../recorded.jsonl"},
    "baselines": {"arms": ["base"]},
    "evaluation": {"max_requests": None, "probes_per_kind": 3},
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "train": {"num_epochs": 1}, "sampling": {"temperature": 0.0},
    "evaluation": {"max_requests": 3, "probes_per_kind": 0, "num_bootstrap": 100, "background": "../background.jsonl"},
}  # fmt: skip
TINY_DOCUMENTS, TINY_SHARE = 8, 8


def make_project(folder: Path, *, tiny: bool, model: str | None = None) -> giong.Project:
    """The sample author as a project, or the project that is there from an earlier run."""
    writing, _ = samples.write_author(folder, TINY_DOCUMENTS if tiny else None)
    if (folder / "voice" / "giong.yaml").is_file():
        return giong.Project(folder / "voice")
    if tiny:
        few = samples.background_rows()[::TINY_SHARE]
        (folder / "background.jsonl").write_text("".join(json.dumps(row) + "\n" for row in few), encoding="utf-8")
    settings = {name: {**SETTINGS.get(name, {}), **(TINY.get(name, {}) if tiny else {})} for name in SETTINGS | TINY}
    return giong.init(folder / "voice", sources=[writing], model=model, settings=settings)


def configure(project: giong.Project, **sections: Any) -> None:
    """Replace sections of giong.yaml; of `data` and `evaluation` only the keys given."""
    settings = yaml.safe_load(project.config_path.read_text(encoding="utf-8"))
    for name, values in sections.items():
        settings[name] = {**settings[name], **values} if name in ("data", "evaluation") else values
    project.config_path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def vote(project: giong.Project) -> int:
    """The rule: the author's own text wins against the model's answer. Every second test document is voted on; returns the votes."""
    comparison = giong.compare(project, ["fine_tuned", "author"])
    voted = set(sorted({pair.document_id for pair in comparison.pairs})[::2])
    pairs = [pair for pair in comparison.remaining(RATER) if pair.document_id in voted]
    for pair in pairs:
        comparison.vote(pair, "left" if pair.arms[0] == "author" else "right", rater=RATER, consent=CONSENT)
    comparison.export(project.root / "pairs.jsonl")
    return len(pairs)


def measured(project: giong.Project) -> dict[str, Any]:
    """What `giong eval` found out about the tuned model."""
    stored = json.loads((project.root / "evaluation.json").read_text(encoding="utf-8"))["evaluation"]
    arm = next(arm for arm in stored["arms"] if arm["name"] == "fine_tuned")
    gap, recall = arm["style_gap_closed"], arm["key_recall"]
    return {
        "test requests": stored["num_requests"],
        "style gap closed": f"{gap['point']:.0%} [{gap['low']:.0%} to {gap['high']:.0%}]" if gap else "not measurable",
        "key recall": f"{recall['point']:.0%}" if recall else "not measured",
        "gates failed": ", ".join(gate["name"] for gate in arm["gates"] if gate["status"] == "fail") or "none",
    }


def walk(folder: Path, *, tiny: bool = False, model: str | None = None) -> dict[str, Mapping[str, Any]]:
    """The whole loop; returns the figures `before` and `after`, and those of the `reward` model and of `dpo` on the held-out pairs."""
    project = make_project(folder, tiny=tiny, model=model)
    if not (project.root / "pairs.jsonl").is_file():
        giong.run(project, ["import", "synth", "baseline", "train", "eval"])
        print(f"{vote(project)} votes")
        configure(project, data={"preferences": "pairs.jsonl"}, evaluation={"exclude_preferences": True})
    # The same model as before, on the documents that nobody voted on.
    configure(project, name="voice", objective={"name": "sft"}, method={"name": "lora"})
    giong.run(project, ["baseline", "train", "eval"])
    found: dict[str, Mapping[str, Any]] = {"before": measured(project)}
    configure(project, objective={"name": "reward"})
    giong.run(project, ["train"])
    found["reward"] = json.loads((project.root / "reward_models" / "voice" / "held_out.json").read_text(encoding="utf-8"))
    configure(project, name="aligned", objective={"name": "dpo"}, method={"name": "lora", "start_from": "voice"})
    giong.run(project, ["train", "eval"])
    run = json.loads((project.root / "models" / "aligned" / "model.json").read_text(encoding="utf-8"))["run"]
    results = json.loads((project.root / "runs" / run / "results.json").read_text(encoding="utf-8"))
    return {**found, "dpo": results["held_out"], "after": measured(project)}


def main() -> None:
    parser = argparse.ArgumentParser(description="From votes to a better-aligned model, on bundled data.")
    parser.add_argument("--folder", type=Path, default=Path("votes-demo"), help="where to make the project")
    parser.add_argument("--tiny", action="store_true", help="few documents, one pass: to see that it works, not what it is worth")
    options = parser.parse_args()
    found = walk(options.folder, tiny=options.tiny)
    for name in found["before"]:
        print(f"{name:18} before {found['before'][name]}   after {found['after'][name]}")
    for name in ("reward", "dpo"):
        print(f"{name} on the held-out pairs: " + ", ".join(f"{key} {value:.3g}" for key, value in found[name].items()))


if __name__ == "__main__":
    main()
