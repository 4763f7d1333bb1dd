"""Settings that break each other, or that nothing would read, are refused in one sentence before anything is done."""

from __future__ import annotations

from typing import Any

import pytest

from giong.config import MethodConfig, TrainConfig, parse
from giong.errors import ConfigError
from giong.sizing.moving import check_anchor

PAIRS = {"preferences": "pairs.jsonl"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "embed", "objective": {"name": "pretrain"}}, "task embed has an objective of its own"),
        ({"task": "classify", "objective": {"name": "grpo"}}, "task classify has an objective of its own"),
        ({"task": "mlm", "method": {"name": "prompt_tuning"}}, "prompt_tuning is made for models that write: choose another with task mlm"),
        ({"task": "mlm", "method": {"name": "qlora"}}, "qlora is made for models that write"),
        (
            {"objective": {"name": "reward"}, "method": {"name": "prefix_tuning"}, "data": PAIRS},
            "choose another with objective.name reward",
        ),
        ({"objective": {"name": "reward"}, "method": {"start_from": "voice"}, "data": PAIRS}, "method.start_from is for learning"),
        ({"objective": {"name": "grpo"}, "train": {"eval_steps": 5, "load_best_model_at_end": True}}, "train.load_best_model_at_end"),
        ({"objective": {"name": "ppo"}, "train": {"eval_steps": 5, "early_stopping_patience": 2}}, "train.early_stopping_patience"),
        ({"objective": {"name": "rloo", "loss_on": "all"}}, "objective.loss_on all is for learning the author's answers"),
        (
            {"objective": {"name": "distill", "teacher": "t", "on_policy_share": 0.5, "loss_on": "all"}},
            "objective.loss_on all is for learning the author's answers",
        ),
        ({"objective": {"name": "dpo", "dpo_loss": "ipo", "label_smoothing": 0.2}, "data": PAIRS}, "leave it out with ipo"),
    ],
)
def test_what_would_break_or_do_nothing_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(settings)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": {"name": "grpo"}, "train": {"eval_steps": 5}},
        {"objective": {"name": "distill", "teacher": "t", "loss_on": "all"}},
        {"objective": {"name": "dpo", "dpo_loss": "ipo"}, "data": PAIRS},
        {"task": "mlm", "method": {"name": "norm"}},
        {"objective": {"name": "sft"}, "method": {"name": "prompt_tuning"}},
    ],
)
def test_what_goes_together_is_taken(settings: dict[str, Any]) -> None:
    parse(settings)


def test_decay_that_would_take_the_base_apart_is_refused() -> None:
    """Of PiSSA's matrices zero is not the base; of LoRA's it is."""
    check_anchor(MethodConfig(name="lora"), TrainConfig(weight_decay=0.1))
    with pytest.raises(ConfigError, match="which weight decay would take out of the model"):
        check_anchor(MethodConfig(name="lora", init_lora_weights="pissa"), TrainConfig(weight_decay=0.1))
    for method in (MethodConfig(name="prompt_tuning"), MethodConfig(name="lora", init_lora_weights="pissa")):
        with pytest.raises(ConfigError) as refused:
            check_anchor(method, TrainConfig(l2_to_base=1.0))
        assert "Set train.weight_decay instead" not in str(refused.value)
