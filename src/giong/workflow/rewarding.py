"""Step `train` with `objective.name: reward`: a reward model from preference pairs, and what it is worth on pairs held out.

It lies in `reward_models/NAME` and not in `models/`: it judges answers and cannot be asked for any.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from giong.contracts import Preference, ScoreRequest, Side
from giong.engine.reward import RewardModel
from giong.evaluation.preferences import reward_figures
from giong.models.load import chat_format
from giong.models.preference_rows import preference_rows
from giong.models.row_model import RowModel, label_settings
from giong.models.rows import Row
from giong.objectives import objective_of
from giong.workflow.row_training import train_rows, trained_model
from giong.workflow.story import Story, examples_hash
from giong.workspace import content_hash, write_json

STEP = "reward_model"


def reward_model_folder(story: Story) -> Path:
    return story.project.root / "reward_models" / story.config.name


def load_reward_model(story: Story, folder: Path | None = None) -> RewardModel:
    """The reward model of this project, or that of `folder`, loaded from what was saved. Raises StoryError before there is one."""
    loaded, record = trained_model(story, folder or reward_model_folder(story))
    # A chat template that was set belongs to the base that it was set for.
    own = record["base"] == story.config.model.name_or_path
    config = story.config.model if own else story.config.model.model_copy(update={"chat_template": None})
    return RewardModel(loaded, chat_format(config, loaded.tokenizer))


def train_reward_model(story: Story) -> None:
    """Train a head with one output, and the base by the method; then score the held-out pairs."""
    objective, pairs = story.config.objective.resolved(), story.preferences

    def make_rows(loaded: RowModel, side: Side) -> list[Row]:
        chat = chat_format(story.config.model, loaded.tokenizer)
        rows, report = preference_rows(chat, loaded.max_seq_length, pairs[side])
        if report.too_long:
            story.notice(
                "train",
                f"{len(report.too_long)} {side} pairs do not fit into {loaded.max_seq_length} tokens and are left out, first: {report.too_long[0]}",
            )
        return [replace(row, weights=np.zeros_like(row.weights), target=np.zeros(1, dtype=np.float32)) for row in rows]

    folder = reward_model_folder(story)
    data_key = content_hash(*(examples_hash(pairs[side]) for side in pairs), objective.record())
    train_rows(
        story, make_rows, objective_of(objective), label_settings([], "regression"), data_key, step=STEP, folder=folder, task="reward",
        new_head_epochs=False,
    )  # fmt: skip
    _measure(story, pairs["calibration"], folder)


def _measure(story: Story, held_out: list[Preference], folder: Path) -> None:
    key = content_hash(
        (story.project.step_record(STEP) or {}).get("key", ""), examples_hash(held_out), story.config.evaluation.num_bootstrap
    )
    if story.is_current("reward_held_out", key):
        return
    asked = [ScoreRequest(answer, pair.messages) for pair in held_out for answer in (pair.chosen, pair.rejected)]
    rewards = load_reward_model(story).rewards(asked)
    figures = reward_figures(
        rewards[::2], rewards[1::2], [content_hash(pair.messages) for pair in held_out],
        num_bootstrap=story.config.evaluation.num_bootstrap, seed=story.config.evaluation.seed,
    )  # fmt: skip
    write_json(folder / "held_out.json", figures)
    story.project.finish_step("reward_held_out", key, [folder / "held_out.json"], figures)
    story.notice(
        "train",
        f"{figures['num_pairs']} held-out pairs: accuracy {figures['accuracy']:.2f} ({figures['accuracy_low']:.2f} to "
        f"{figures['accuracy_high']:.2f}), calibration error {figures['calibration_error']:.2f}, log-loss {figures['log_loss']:.3f} nats "
        "(0.693 is chance)",
    )
