"""Online objectives through the one loop: what is rewarded becomes likelier, a killed run goes on to the same bytes, a fooled reward ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from giong.config import MethodConfig, ObjectiveConfig, parse
from giong.contracts import Event, Example, Message, Reply
from giong.engine.loop import train
from giong.engine.loop_config import LoopConfig, TrainResult
from giong.engine.packing import pack
from giong.engine.step import evaluate_rows
from giong.engine.value_head import ValueHead
from giong.errors import ConfigError, Interrupted
from giong.methods import METHODS, Trainable
from giong.models.rows import Row
from giong.objectives import objective_of
from giong.workflow.advantages import explained_variance
from giong.workflow.beside import Beside
from giong.workflow.drawing import Draws, hacked, num_scorings

CONFIG = LoopConfig(
    learning_rate=0.1, num_epochs=4, batch_rows=4, max_tokens_per_pack=256, warmup_share=0.0, schedule="constant", optimizer="adamw",
    weight_decay=0.0, max_grad_norm=1.0, seed=3, save_seconds=1e9, save_steps=None, keep_checkpoints=2,
)  # fmt: skip
REQUESTS = [f"r{number}" for number in range(8)]


class EvenTokens:
    """Rewards answers of even tokens: nothing to do with language, so that nothing but the objective can raise it."""

    def __init__(self, sign: float = 1.0) -> None:
        self.sign = sign

    def __call__(self, examples: Sequence[Example], replies: Sequence[Reply]) -> dict[str, np.ndarray]:
        shares = np.array([np.mean([int(token) % 2 == 0 for token in reply.text.split()] or [0.0]) for reply in replies])
        return {"total": self.sign * shares, "ends": np.ones(len(replies))}


class ByRequest:
    """The first of two requests earns 1 more than the other, whatever is answered."""

    def __init__(self, least: float) -> None:
        self.least = least

    def __call__(self, examples: Sequence[Example], replies: Sequence[Reply]) -> dict[str, np.ndarray]:
        return {"total": self.least + np.array([float(one.id == REQUESTS[0]) for one in examples]), "ends": np.ones(len(replies))}


class Chat:
    end_token_ids = (2,)

    @staticmethod
    def decode(tokens: Sequence[int]) -> str:
        return " ".join(str(token) for token in tokens)


class Loaded:
    chat, max_seq_length = Chat(), 64


class Run:
    """An online run over a tiny random model; `go()` again is what a new process would do after a kill."""

    def __init__(
        self, tiny_model: Callable, folder: Path, objective: ObjectiveConfig, rewards: Any, num_epochs: float = 4, **changes: Any
    ) -> None:
        self.tiny_model, self.folder, self.objective, self.rewards, self.events = tiny_model, folder, objective.resolved(), rewards, []
        self.requests = REQUESTS[: changes.pop("num_requests", len(REQUESTS))]
        self.config = replace(CONFIG, num_epochs=num_epochs, **changes)
        self.trainable: Trainable | None = None

    def go(self, stop_at: int | None = None) -> TrainResult:
        method = MethodConfig(name="lora", lora_r=4, lora_alpha=8.0, lora_dropout=0.0)
        self.trainable = METHODS["lora"].apply(self.tiny_model("llama").model, method, seed=0)
        examples = {name: Example(name, name, "question", (Message("user", name),), "x") for name in self.requests}
        head = ValueHead(self.trainable.model.config.hidden_size, self.trainable.model.device)
        factors = dict.fromkeys(head.parameters, self.objective.value_learning_rate / self.config.learning_rate)
        beside = Beside(head.forward, head, head.parameters, factors) if self.objective.name == "ppo" else Beside()
        draws = Draws(
            Loaded(), self.trainable, self.objective, examples, self.rewards, 8, 256, self.config.seed, self.folder / "draws.jsonl",
            beside.value_head,
        )  # fmt: skip
        generator = np.random.default_rng(1)
        rows = [Row(generator.integers(3, 200, 6), np.array([0, 0, 0, 0, 1, 1], dtype=np.float32), name) for name in self.requests]
        done = [0]

        def emit(event: Event) -> None:
            self.events.append(event)
            done[0] += event.kind == "step"

        return train(
            self.trainable.model, {**self.trainable.parameters, **beside.parameters}, rows, objective_of(self.objective), self.config,
            checkpoints=self.folder / "checkpoints", emit=emit, draw=draws, should_stop=lambda: done[0] == stop_at,
            forward=beside.forward, learning_rate_factors=beside.learning_rate_factors,
        )  # fmt: skip

    def by_step(self, figure: str) -> list[float]:
        return [event.data[figure] for event in self.events if event.kind == "step"]

    @property
    def rewards_by_step(self) -> list[float]:
        return self.by_step("reward")


OBJECTIVES = {
    "grpo": ObjectiveConfig(name="grpo", beta=0.01, num_generations=8),
    "grpo, two updates": ObjectiveConfig(name="grpo", beta=0.01, num_generations=8, num_updates=2),
    "rloo": ObjectiveConfig(name="rloo", beta=0.01, num_generations=8),
}
PPO = ObjectiveConfig(name="ppo", beta=0.01, num_generations=8, num_updates=3, value_learning_rate=0.1)


@pytest.mark.parametrize("case", OBJECTIVES)
def test_what_is_rewarded_becomes_likelier(case: str, tiny_model: Callable, tmp_path: Path):
    objective = OBJECTIVES[case]
    run, opposite = (Run(tiny_model, tmp_path / str(sign), objective, EvenTokens(sign), 16) for sign in (1.0, -1.0))
    result = run.go()
    opposite.go()
    first, last = np.mean(run.rewards_by_step[:3]), np.mean(run.rewards_by_step[-3:])
    assert last > first + 0.1
    # Planted: the reward turned round takes the same answers away.
    assert -np.mean(opposite.rewards_by_step[-3:]) < first - 0.1
    assert 0 < result.generate_share < 1
    step = next(event.data for event in run.events if event.kind == "step")
    assert {"reward", "reward_spread", "length", "kl", "entropy", "generate_seconds"} <= set(step)


def test_a_killed_run_goes_on_to_the_same_bytes(tiny_model: Callable, tmp_path: Path):
    whole, killed = (Run(tiny_model, tmp_path / name, OBJECTIVES["grpo, two updates"], EvenTokens()) for name in ("whole", "killed"))
    whole.go()
    with pytest.raises(Interrupted):
        killed.go(stop_at=3)
    killed.go()
    assert killed.rewards_by_step == whole.rewards_by_step
    for name, parameter in whole.trainable.parameters.items():
        assert torch.equal(parameter, killed.trainable.parameters[name]), name
    assert (tmp_path / "killed" / "draws.jsonl").read_text() == (tmp_path / "whole" / "draws.jsonl").read_text()


def test_ppo_learns_with_its_value_head_and_goes_on_to_the_same_bytes(tiny_model: Callable, tmp_path: Path):
    """What is rewarded becomes likelier, and a killed run takes up policy and values."""
    whole, killed = (Run(tiny_model, tmp_path / name, PPO, EvenTokens(), 8) for name in ("whole", "killed"))
    whole.go()
    assert np.mean(whole.rewards_by_step[-3:]) > np.mean(whole.rewards_by_step[:3]) + 0.1
    steps = [event.data for event in whole.events if event.kind == "step"]
    assert {"value_loss", "clip_share", "kl", "entropy", "explained_variance", "length"} <= set(steps[0])
    assert steps[0]["explained_variance"] == 0.0
    with pytest.raises(Interrupted):
        killed.go(stop_at=6)
    killed.go()
    assert killed.rewards_by_step == whole.rewards_by_step
    assert [event.data["value_loss"] for event in killed.events if event.kind == "step"] == [step["value_loss"] for step in steps]


def test_values_learn_what_a_request_earns_wherever_rewards_lie(tiny_model: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A constant in all rewards is no news: with gamma 1 it changes neither advantages nor how much of the returns is explained."""
    objective = PPO.model_copy(update={"value_learning_rate": 0.03})

    def explained(name: str, least: float) -> list[float]:
        run = Run(tiny_model, tmp_path / name, objective, ByRequest(least), 12, num_requests=2, learning_rate=1e-4)
        run.go()
        return run.by_step("explained_variance")

    around_zero, far = explained("around zero", -0.5), explained("far", 2.0)
    assert np.mean(around_zero[-4:]) > 0.5
    assert far == pytest.approx(around_zero, abs=0.01)
    # Planted: a head that does not start at the mean reward.
    monkeypatch.setattr(ValueHead, "start_at", lambda self, value: None)
    assert np.mean(explained("from nothing", 2.0)[-4:]) < 0


def test_a_value_head_learns_what_the_states_tell_and_leaves_the_model_alone(tiny_model: Callable):
    """Returns that say which token was read last: none of them at the start, nearly all of them after 100 steps of least squares."""
    model = tiny_model("llama").model.requires_grad_(True)
    generator = np.random.default_rng(2)
    rows = [Row(generator.integers(3, 9, 12), np.array([0, *[1] * 11], dtype=np.float32)) for _ in range(8)]
    packed, head = pack(rows), ValueHead(model.config.hidden_size, model.device)
    returns = packed.input_ids_T[packed.loss_positions_N].float()
    optimizer = torch.optim.Adam(head.parameters.values(), lr=1.0)
    found = []
    for _ in range(100):
        values = head.forward(model, packed)["values_N"]
        found.append(explained_variance(values.detach().numpy(), returns.numpy()))
        optimizer.zero_grad()
        ((values - returns) ** 2).mean().backward()
        optimizer.step()
    assert found[0] == 0.0 and found[-1] > 0.8
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_reward_that_rises_while_a_gate_falls_is_said():
    lines = [
        {"step": step, "reward": step / 20, "reward_ends": 1.0 - step / 30, "reward_repetition": -0.1, "reward_key_recall": 0.5,
         "reward_copying": 0.0} for step in range(20)
    ]  # fmt: skip
    assert hacked(lines[:19]) == ""
    assert "ends by 0.33" in hacked(lines)
    assert hacked([{**line, "reward_ends": 1.0} for line in lines]) == ""
    assert hacked([{**line, "reward": 0.5} for line in lines]) == ""


@pytest.mark.parametrize("settings", [{"train": {"replay_share": 0.2}}, {"evaluation": {"num_canaries": 2}}])
def test_rows_that_nobody_could_be_asked_are_refused(settings: dict[str, Any]):
    with pytest.raises(ConfigError, match="grpo, which learns from answers that the model draws"):
        parse({"objective": {"name": "grpo"}, **settings})


@pytest.mark.parametrize("objective", [*OBJECTIVES.values(), PPO], ids=[*OBJECTIVES, "ppo"])
def test_passes_over_what_was_drawn_are_those_that_an_estimate_counts(
    tiny_model: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: ObjectiveConfig
):
    scored: list[int] = []

    def watched(model: torch.nn.Module, rows: Sequence[Row], *rest: Any) -> list[torch.Tensor]:
        scored.append(sum(map(len, rows)))
        return evaluate_rows(model, rows, *rest)

    monkeypatch.setattr("giong.workflow.drawing.evaluate_rows", watched)
    run = Run(tiny_model, tmp_path, objective, EvenTokens(), num_epochs=1)
    result = run.go()
    num_drawn = result.num_tokens / run.objective.num_updates
    assert sum(scored) == num_scorings(run.objective) * num_drawn
    assert num_scorings(ObjectiveConfig()) == 0
