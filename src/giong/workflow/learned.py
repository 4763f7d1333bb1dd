"""The learned models of section `evaluation` within a story: loaded where they are named, let go when they have spoken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from giong.evaluation.results import AUTHOR, ArmOutput
from giong.workflow.other_models import measuring_models
from giong.workflow.story import Story

if TYPE_CHECKING:
    from giong.generation.learned_measures import StyleVectors


def learned_figures(story: Story, outputs: Sequence[ArmOutput]) -> dict[str, dict[str, np.ndarray]]:
    """BERTScore and entailment of each reply with the author's answer: by figure, then by arm, the author's own answers among them."""
    from giong.generation.learned_measures import BertScore, Entailment

    folders = measuring_models(story.project, story.config.evaluation)
    answers = [example.answer for example in story.test_examples]
    texts = {output.name: [reply.text for reply in output.replies] for output in outputs} | {AUTHOR: answers}
    found: dict[str, dict[str, np.ndarray]] = {}
    for figure, setting, kind in (("bertscore", "bertscore_model", BertScore), ("entailment", "nli_model", Entailment)):
        if setting in folders:
            measure = kind(folders[setting], story.config.model.device)
            found[figure] = {arm: measure(own, answers) for arm, own in texts.items()}
            if measure.num_full:
                limit = f"the {measure.max_seq_length} tokens that evaluation.{setting} reads"
                story.notice("eval", f"{measure.num_full} texts fill {limit}: what is longer was cut")
    return found


def style_vectors(story: Story) -> StyleVectors | None:
    """What `evaluation.style_model` makes of texts; None where none is named."""
    from giong.generation.learned_measures import StyleVectors

    folder = measuring_models(story.project, story.config.evaluation).get("style_model")
    return StyleVectors(folder, story.config.model.device) if folder else None
