"""Step `merge-adapters`: models of the project that share its base, added into a new one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from giong.errors import ConfigError
from giong.export.adapters import add_adapters
from giong.workflow.story import Stage, Story
from giong.workspace import atomic_folder, content_hash, read_json, safe_name, write_json


def merge_adapters(story: Story) -> None:
    """Add the models that section `adapters` names. Raises ConfigError for models that are not there or have no adapter."""
    wanted = story.config.adapters
    if len(wanted.merge) < 2 or not wanted.name:
        raise ConfigError("Two models and a name are needed", place="adapters", remedy="giong adapters merge A B --name NEW.")
    records = {name: _record(story, name) for name in wanted.merge}
    safe_name(wanted.name)
    weights = wanted.weights or [1 / len(records)] * len(records)
    folders = [story.project.model_path(name) / "adapter" for name in wanted.merge]
    target = story.project.model_path(wanted.name)
    key = content_hash(wanted, *(folder / "adapter_model.safetensors" for folder in folders))
    if wanted.name in records or (target.exists() and read_json(target / "model.json").get("merged_from") is None):
        raise ConfigError(f"There is a model {wanted.name!r} already", place="adapters.name", remedy="Give the new one another name.")
    if story.is_current("merge-adapters", key) and target.exists():
        return
    with (
        Stage(story, "merge-adapters", " + ".join(f"{weight:g} {name}" for weight, name in zip(weights, records))),
        atomic_folder(target) as made,
    ):
        (made / "adapter").mkdir()
        add_adapters(story.config.model, folders, weights, made / "adapter", combination=wanted.combination, rank=wanted.rank)
        first, parts = records[wanted.merge[0]], dict(zip(records, weights))
        write_json(
            made / "model.json",
            {
                **first, "name": wanted.name, "created": int(time.time()), "run": f"merged-{key[:8]}", "sampling_trials": [],
                "merged_from": parts, "consent": _joint_consent([record["consent"] for record in records.values()]),
            },
        )  # fmt: skip
    story.project.finish_step("merge-adapters", key, [target / "model.json"], {"name": wanted.name, "parts": parts})
    story.notice("merge-adapters", f"saved as model {wanted.name!r}: it has not been evaluated")


def _record(story: Story, name: str) -> dict[str, Any]:
    path: Path = story.project.model_path(safe_name(name)) / "model.json"
    names = ", ".join(folder.name for folder in story.project.list_models()) or "none"
    if not path.is_file():
        raise ConfigError(f"There is no model {name!r}", place="adapters.merge", remedy=f"Models here: {names}.")
    record = read_json(path)
    if record["format"] != "adapter" or record["base"] != story.config.model.name_or_path:
        raise ConfigError(
            f"The model {name!r} ({record['format']} over {record['base']}) is no adapter of this project's base", place="adapters.merge",
            remedy="Add models that were trained with lora over the same base.",
        )  # fmt: skip
    return record


def _joint_consent(consents: list[dict[str, Any]]) -> dict[str, Any]:
    """All authors; granted where all have agreed, until the first of them ends it."""
    until = [consent["until"] for consent in consents if consent["until"]]
    authors = dict.fromkeys(consent["author"] for consent in consents if consent["author"])
    return {
        **consents[0],
        "author": " and ".join(authors),
        "granted": all(consent["granted"] for consent in consents),
        "until": min(until, default=""),
    }
