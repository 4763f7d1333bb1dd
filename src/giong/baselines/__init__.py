"""The ways of prompting that fine-tuning has to beat. Each wraps a Predictor and is a Predictor, scored like any arm."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from giong.baselines.few_shot import FewShot, choose_shots
from giong.baselines.named_style import NamedStyle, style_passages
from giong.baselines.prompt import Base, Instruction, instruction_text
from giong.baselines.prompted import Prompted
from giong.baselines.retrieval import Retrieval
from giong.baselines.turns import CountTokens
from giong.config import BaselinesConfig
from giong.contracts import Example, Predictor

__all__ = ["BASELINES", "Base", "CountTokens", "FewShot", "Instruction", "NamedStyle", "Prompted", "Retrieval"]


def build_base(
    predictor: Predictor, train_examples: Sequence[Example], config: BaselinesConfig, *,
    count_tokens: CountTokens | None = None, max_prompt_tokens: int | None = None,
) -> Base:  # fmt: skip
    return Base(predictor)


def build_instruction(
    predictor: Predictor, train_examples: Sequence[Example], config: BaselinesConfig, *,
    count_tokens: CountTokens | None = None, max_prompt_tokens: int | None = None,
) -> Instruction:  # fmt: skip
    return Instruction(predictor, instruction_text(train_examples))


def build_named_style(
    predictor: Predictor, train_examples: Sequence[Example], config: BaselinesConfig, *,
    count_tokens: CountTokens | None = None, max_prompt_tokens: int | None = None,
) -> NamedStyle:  # fmt: skip
    return NamedStyle(predictor, style_passages(train_examples), count_tokens=count_tokens, max_prompt_tokens=max_prompt_tokens)


def build_few_shot(
    predictor: Predictor, train_examples: Sequence[Example], config: BaselinesConfig, *,
    count_tokens: CountTokens | None = None, max_prompt_tokens: int | None = None,
) -> FewShot:  # fmt: skip
    shots = choose_shots(train_examples, config.num_shots)
    return FewShot(predictor, shots, train_examples, count_tokens=count_tokens, max_prompt_tokens=max_prompt_tokens)


def build_retrieval(
    predictor: Predictor, train_examples: Sequence[Example], config: BaselinesConfig, *,
    count_tokens: CountTokens | None = None, max_prompt_tokens: int | None = None,
) -> Retrieval:  # fmt: skip
    return Retrieval(predictor, train_examples, config.num_shots, count_tokens=count_tokens, max_prompt_tokens=max_prompt_tokens)


BASELINES: dict[str, Callable[..., Prompted]] = {
    "base": build_base,
    "instruction": build_instruction,
    "named_style": build_named_style,
    "few_shot": build_few_shot,
    "retrieval": build_retrieval,
}
"""Name of an arm (`baselines.arms`) -> its builder. A new way of prompting is one file and one line here."""
