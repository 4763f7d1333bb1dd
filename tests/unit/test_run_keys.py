"""What a run learns from and depends on: rows of drawn answers, of raw text, and the contents that are part of its key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from giong.config import parse
from giong.contracts import Example, Message
from giong.engine.anchor import Anchor
from giong.engine.value_head import NAMES, ValueHead
from giong.workflow import training

TALK = (Message("user", "First?"), Message("assistant", "One."), Message("user", "Second?"))
EXAMPLES = [
    Example("a", "d", "conversation", TALK, "Two."),
    Example("b", "d", "conversation", (*TALK, Message("assistant", "A tool's.")), ""),
]


def story_of(folder: Path, loaded: Any = None, validated: Sequence[Example] = (), **settings: Any) -> Any:
    return SimpleNamespace(
        config=parse(settings), local=SimpleNamespace(loaded=loaded), project=SimpleNamespace(root=folder),
        learnt_from=lambda side: validated,
    )  # fmt: skip


@pytest.mark.parametrize(("objective", "asked"), [("grpo", "Second?"), ("rloo", "Second?"), ("sft", "First?")])
def test_drawn_answers_are_those_to_the_last_request(tmp_path: Path, tiny_model: Callable, objective: str, asked: str) -> None:
    """Rewards know its answer. A conversation without one is not asked."""
    loaded = tiny_model("llama")
    rows, _ = training.rows_of(story_of(tmp_path, loaded, objective={"name": objective}), EXAMPLES)
    assert len(rows) == (1 if objective != "sft" else 2)
    prompt = loaded.tokenizer.decode(rows[0].input_ids[: np.flatnonzero(rows[0].weights)[0]])
    assert prompt.rindex("user") < prompt.rindex(asked) and asked in prompt.rsplit("user", 1)[1]


def test_the_authors_raw_text_has_a_name_and_replayed_text_has_none(tmp_path: Path, tiny_model: Callable) -> None:
    rows, _ = training.rows_of(story_of(tmp_path, tiny_model("llama"), objective={"name": "pretrain"}), EXAMPLES)
    assert rows and all(row.name for row in rows)


@pytest.mark.parametrize(
    ("settings", "is_in"),
    [
        ({"train": {"eval_steps": 5}}, True),
        ({}, False),
        ({"objective": {"name": "dpo"}, "data": {"preferences": "pairs.jsonl"}}, True),
    ],
)
def test_what_a_run_is_validated_on_is_part_of_it_where_it_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], is_in: bool
) -> None:
    monkeypatch.setattr(training, "other_models", lambda story: [])
    found = []
    for validated in (EXAMPLES[:1], EXAMPLES):
        story = story_of(tmp_path, validated=validated, **settings)
        found.append(training.beside_examples(story, story.config.method))
    assert (found[0] != found[1]) is is_in


def test_values_are_held_nowhere() -> None:
    """A pull to the start moves what belongs to the model, and leaves the value head, whose start means nothing."""
    head, weight = ValueHead(3, torch.device("cpu")), torch.nn.Parameter(torch.zeros(2))
    assert tuple(head.parameters) == NAMES
    masters = {"weight": torch.ones(2), **{name: torch.ones_like(each) for name, each in head.parameters.items()}}
    Anchor({"weight": weight}).pull(masters, 0.5)
    assert masters["weight"].tolist() == [0.5, 0.5]
    assert all(torch.equal(masters[name], torch.ones_like(masters[name])) for name in NAMES)
