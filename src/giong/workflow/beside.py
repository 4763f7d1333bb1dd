"""What computes beside the model that is trained, where the objective needs it: the teacher of `distill`, the value head of `ppo`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer

from giong.config import ModelConfig
from giong.engine.row_check import check_tokens
from giong.engine.step import Forward, forward
from giong.engine.teacher import Teacher
from giong.engine.value_head import ValueHead
from giong.models.load import load_model, model_identity
from giong.models.rows import Row
from giong.workflow.other_models import check_vocabulary, named_reward_model, named_teacher
from giong.workflow.story import Story


@dataclass(frozen=True)
class Beside:
    """How a pack becomes named tensors, and what moves beside the method's own parameters."""

    forward: Forward = forward
    value_head: ValueHead | None = None
    parameters: Mapping[str, torch.nn.Parameter] = field(default_factory=dict)
    learning_rate_factors: Mapping[str, float] = field(default_factory=dict)


def other_models(story: Story) -> list[Path | str]:
    """What a run's key has to hold of the reward model and the teacher that the objective names."""
    judge, teacher = named_reward_model(story.project, story.config.objective), named_teacher(story.project, story.config.objective)
    return ([judge / "model.json"] if judge else []) + ([model_identity(_config(story, teacher))] if teacher else [])


def _config(story: Story, folder: Path) -> ModelConfig:
    return story.config.model.model_copy(update={"name_or_path": str(folder)})


def beside_of(story: Story, learning_rate: float, rows: Sequence[Row], stage_name: str) -> Beside:
    """What `story`'s objective needs, a teacher in the student's dtype; `learning_rate` and `rows` are the run's.

    Raises ConfigError where the teacher has other tokens, ModelError where it cannot read packed rows."""
    student = story.local.loaded
    if story.config.objective.name == "ppo":
        head = ValueHead(student.shape.hidden_size, student.model.device)
        # The head knows nothing of the states yet, while the rate of the run is one for a model that can write.
        factor = story.config.objective.value_learning_rate / learning_rate
        return Beside(head.forward, head, head.parameters, dict.fromkeys(head.parameters, factor))
    folder = named_teacher(story.project, story.config.objective)
    if folder is None:
        return Beside()
    check_vocabulary(student.tokenizer.get_vocab(), AutoTokenizer.from_pretrained(str(folder), local_files_only=True).get_vocab())
    teacher = load_model(_config(story, folder), dtype=student.model.dtype, device=student.model.device)
    check_tokens(teacher.model, rows)
    story.notice(
        stage_name, f"the teacher reads every row too ({teacher.shape.num_parameters:,} parameters), which the estimate leaves out"
    )
    return Beside(Teacher(teacher.model).forward)
