"""Answers that the model draws while it is trained, with their rewards and advantages: what online objectives learn from.

One decision a reader may question: requests are the author's training examples. Their answers are never learnt here; they are what
some rewards compare with, and they say how long an answer may become.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from giong.config import ObjectiveConfig
from giong.config.training import ONLINE
from giong.contracts import Example, Reply, Sampling
from giong.engine.anchor import Anchor
from giong.engine.loop_config import LoopConfig
from giong.engine.rollout import Rollout
from giong.engine.step import evaluate_rows
from giong.engine.value_head import ValueHead
from giong.generation.decoder import Generation, decode
from giong.methods import Trainable
from giong.models.load import LoadedModel
from giong.models.rows import Row
from giong.workflow.advantages import explained_variance, generalised_advantages, group_relative, leave_one_out, standardised, token_rewards
from giong.workflow.beside import Beside
from giong.workflow.rewards import Rewards
from giong.workflow.story import Story
from giong.workspace import append_jsonl, read_jsonl, write_jsonl

WATCHED = ("ends", "repetition", "key_recall", "copying")
"""Rewards that are gates too: what must not fall while the total rises."""
WATCH_STEPS, MAX_FALL = 10, 0.15
"""Steps that are averaged at the start and at the end, and the fall of a gate that ends a run whose reward has risen."""


@dataclass
class Draws:
    """Called by the engine with the rows of a step and its number. `journal` gets a line per step; a resumed run reads it again."""

    loaded: LoadedModel
    trainable: Trainable
    config: ObjectiveConfig
    examples: dict[str, Example]
    rewards: Rewards
    max_new_tokens: int
    max_tokens_per_pack: int
    seed: int
    journal: Path
    value_head: ValueHead | None = None
    anchor: Anchor = field(init=False)

    def __post_init__(self) -> None:
        # As the model is before its first step: whoever makes this has not resumed yet.
        self.anchor = Anchor(self.trainable.parameters)

    def __call__(self, rows: Sequence[Row], step: int) -> Rollout:
        started = time.monotonic()
        asked = [row for row in rows if row.name in self.examples for _ in range(self.config.num_generations)]
        self.trainable.model.eval()
        drawn = write(self.trainable, self.loaded, self.config, asked, self.max_new_tokens, (self.seed, step))
        seconds = time.monotonic() - started
        replies = [Reply(self.loaded.chat.decode(one.tokens), one.finish_reason or "length") for one in drawn]
        rewards = self.rewards([self.examples[row.name] for row in asked], replies)
        token_weight = 1.0 if self.config.name == "ppo" else None
        learnt = [answer_row(self.loaded, row, one, token_weight) for row, one in zip(asked, drawn)]
        total = rewards["total"]
        figures = {"reward": float(total.mean()), "reward_spread": float(total.std())}
        figures |= {f"reward_{name}": float(values.mean()) for name, values in rewards.items() if name != "total"}
        figures["length"] = float(np.mean([len(one.tokens) for one in drawn]))
        if self.value_head is None:
            learnt = self._by_answer(learnt, total, figures)
        else:
            if step == 0:
                self.value_head.start_at(figures["reward"])
            learnt = self._by_token(learnt, total, figures, self.value_head)
        return Rollout([learnt] * self.config.num_updates, figures, seconds, self._watch(step, figures))

    def _by_answer(self, rows: list[Row], total: np.ndarray, figures: dict[str, float]) -> list[Row]:
        """One advantage per answer, against its siblings; for `rloo` the divergence is taken off the reward (equation 4)."""
        now = self._now(rows) if needs_old_logprobs(self.config) else []
        reference = self._reference(rows)
        if self.config.name == "grpo":
            rows = with_extra(rows, "reference_logprobs_N", reference)
            rows = with_extra(rows, "old_logprobs_N", now) if now else rows
        else:
            divergence = np.array([float((own - other).sum()) for own, other in zip(now, reference)])
            figures["kl"] = float(divergence.mean())
            total = total - self.config.beta * divergence
        advantages = (group_relative if self.config.name == "grpo" else leave_one_out)(total, self.config.num_generations)
        return [replace(row, extras={**row.extras, "advantages_R": value}) for row, value in zip(rows, advantages)]

    def _by_token(self, rows: list[Row], total: np.ndarray, figures: dict[str, float], value_head: ValueHead) -> list[Row]:
        """An advantage and a return per token, against the value head as it is now."""
        config, now = self.config, self._now(rows)
        values = evaluate_rows(self.trainable.model, rows, self.max_tokens_per_pack, value_head.forward, "values_N")
        divergences = [(own - other).numpy() for own, other in zip(now, self._reference(rows))]
        rewards = [token_rewards(reward, each, config.beta) for reward, each in zip(total, divergences)]
        advantages = [generalised_advantages(each, value.numpy(), config.gamma, config.gae_lambda) for each, value in zip(rewards, values)]
        returns = [each + value.numpy() for each, value in zip(advantages, values)]
        figures["kl"] = float(np.mean([each.sum() for each in divergences]))
        figures["explained_variance"] = explained_variance(torch.cat(values).numpy(), np.concatenate(returns))
        parts = np.split(standardised(np.concatenate(advantages)), np.cumsum([len(each) for each in advantages])[:-1])
        for name, of_rows in {"old_logprobs_N": now, "old_values_N": values, "returns_N": returns, "advantages_N": parts}.items():
            rows = with_extra(rows, name, of_rows)
        return rows

    def _now(self, rows: list[Row]) -> list[torch.Tensor]:
        return evaluate_rows(self.trainable.model, rows, self.max_tokens_per_pack)

    def _reference(self, rows: list[Row]) -> list[torch.Tensor]:
        with self.anchor.in_place(self.trainable.model):
            return self._now(rows)

    def _watch(self, step: int, figures: dict[str, float]) -> str:
        """Why to stop: the reward has risen and a gate has fallen; empty otherwise."""
        before = [line for line in read_jsonl(self.journal) if line["step"] < step] if self.journal.is_file() else []
        line = {"step": step, **figures}
        if before and before[-1]["step"] == step - 1 and len(before) == len(read_jsonl(self.journal)):
            append_jsonl(self.journal, line)
        else:
            write_jsonl(self.journal, [*before, line])
        return hacked([*before, line])


@dataclass
class StudentDraws:
    """The same for `distill`: in a share of the steps one answer to each request, to be compared with the teacher's distributions."""

    loaded: LoadedModel
    trainable: Trainable
    config: ObjectiveConfig
    names: frozenset[str]
    max_new_tokens: int
    seed: int

    def __call__(self, rows: Sequence[Row], step: int) -> Rollout:
        started = time.monotonic()
        asked = [row for row in rows if row.name in self.names]
        # Algorithm 1 of 2306.13649: a step is the student's or the author's as a whole.
        if not asked or np.random.default_rng([self.seed, step]).random() >= self.config.on_policy_share:
            return Rollout([list(rows)])
        self.trainable.model.eval()
        drawn = write(self.trainable, self.loaded, self.config, asked, self.max_new_tokens, (self.seed, step))
        learnt = [answer_row(self.loaded, row, one, token_weight=1.0) for row, one in zip(asked, drawn)]
        learnt = [replace(row, extras={"drawn_N": np.ones(np.count_nonzero(row.weights))}) for row in learnt]
        return Rollout([learnt], {"length": float(np.mean([len(one.tokens) for one in drawn]))}, time.monotonic() - started)


def write(
    trainable: Trainable, loaded: LoadedModel, config: ObjectiveConfig, asked: Sequence[Row], max_new_tokens: int, seeds: tuple[int, int]
) -> list[Generation]:  # fmt: skip
    """An answer to the request of each row; `seeds` are those of the run and the step."""
    prompts = [row.input_ids[: int(np.flatnonzero(row.weights)[0])].tolist() for row in asked]
    samplings = [
        Sampling(
            temperature=config.temperature, seed=seed_of(*seeds, number), max_new_tokens=min(max_new_tokens, loaded.max_seq_length - len(prompt))
        )
        for number, prompt in enumerate(prompts)
    ]  # fmt: skip
    return decode(trainable.model, prompts, samplings, loaded.chat.end_token_ids)


def answer_row(loaded: LoadedModel, asked: Row, drawn: Generation, token_weight: float | None = None) -> Row:
    """The answer as it was drawn, its end-of-turn token only where it was; by default each token weighs one over the answer's length."""
    ended = [loaded.chat.end_token_ids[0]] if drawn.finish_reason == "stop" else []
    answer = np.asarray([*drawn.tokens, *ended], dtype=np.int64)
    weights = np.concatenate([np.zeros(len(drawn.prompt)), np.full(len(answer), token_weight or 1 / max(1, len(answer)))]).astype(
        np.float32
    )
    return Row(np.concatenate([np.asarray(drawn.prompt, dtype=np.int64), answer]), weights, asked.name)


def hacked(lines: Sequence[dict[str, Any]]) -> str:
    """The gates that fell while the reward rose, in a sentence; empty where none did, or before there are enough steps."""
    if len(lines) < 2 * WATCH_STEPS:
        return ""

    def change(name: str) -> float:
        first, last = ([line[name] for line in part] for part in (lines[:WATCH_STEPS], lines[-WATCH_STEPS:]))
        return float(np.mean(last) - np.mean(first))

    watched = [name for name in WATCHED if f"reward_{name}" in lines[0]]
    fallen = {name: change(f"reward_{name}") for name in watched if change(f"reward_{name}") < -MAX_FALL}
    if not fallen or change("reward") <= 0:
        return ""
    told = ", ".join(f"{name} by {-value:.2f}" for name, value in fallen.items())
    return f"the reward has risen by {change('reward'):.2f} while {told} fell: the model learns to please the reward"


def with_extra(rows: Sequence[Row], name: str, values: Sequence[torch.Tensor | np.ndarray]) -> list[Row]:
    return [replace(row, extras={**row.extras, name: np.asarray(value)}) for row, value in zip(rows, values)]


def seed_of(seed: int, step: int, number: int) -> int:
    """The seed of one answer: of nothing but the run, the step and the answer's place in it."""
    return int(np.random.SeedSequence([seed, step, number]).generate_state(1)[0])


def needs_old_logprobs(config: ObjectiveConfig) -> bool:
    """Whether what is drawn is scored by the model that drew it: for its reward, or for the ratios of further updates."""
    return config.name != "grpo" or config.num_updates > 1


def num_scorings(config: ObjectiveConfig) -> int:
    """Forward passes over what `Draws` has drawn before it is learnt: by the reference, by the model as it is, by the value head. The
    config's number of updates must be resolved."""
    return (1 + needs_old_logprobs(config) + (config.name == "ppo")) if config.name in ONLINE else 0


def answer_limit(story: Story) -> int:
    """How long a drawn answer may become, in tokens: as set, or as in the evaluation."""
    from giong.workflow.arms import answer_tokens

    return story.config.objective.max_new_tokens or answer_tokens(story)


def draws_of(
    story: Story, trainable: Trainable, loaded: LoadedModel, train: LoopConfig, folder: Path, beside: Beside
) -> Draws | StudentDraws | None:
    """What an objective draws its answers with; None for one that learns from what there is."""
    config = story.config.objective.resolved()
    if not config.is_online:
        return None
    examples, max_new_tokens = {one.id: one for one in story.examples_of("train")}, answer_limit(story)
    if config.name == "distill":
        return StudentDraws(loaded, trainable, config, frozenset(examples), max_new_tokens, train.seed)
    return Draws(
        loaded, trainable, config, examples, Rewards(story, config.rewards), max_new_tokens, train.max_tokens_per_pack, train.seed,
        folder / "draws.jsonl", beside.value_head,
    )  # fmt: skip
