"""The loss watchdog: silent on what ordinary runs look like, however noisy; it stops those that do not come back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_loop import CONFIG, Run

from giong.contracts import LossSum
from giong.engine.checkpoint import list_checkpoints, load_checkpoint
from giong.engine.watchdog import PATIENCE_STEPS, LossWatch
from giong.errors import Interrupted, TrainingError
from giong.objectives import sft

SEEDS = range(200)


def stopped_at(losses: Sequence[float]) -> int | None:
    """The step (from 1) at which the watchdog stops; None for never."""
    watch = LossWatch()
    return next((step for step, loss in enumerate(losses, start=1) if watch.observe(float(loss))), None)


def fine_tuning(generator: np.random.Generator) -> np.ndarray:
    """Three passes over the same rows, each remembered better; rows of very different difficulty, one row a step."""
    level = np.repeat([2.0, 1.4, 0.7], 60)
    return level * generator.lognormal(-0.3, 0.75, size=180)


def pretraining(generator: np.random.Generator) -> np.ndarray:
    steps = np.arange(400)
    return 3.0 + 6.0 * np.exp(-steps / 60) + generator.normal(0, 0.5, size=400)


def spike(generator: np.random.Generator) -> np.ndarray:
    """Four nats up at step 200, back after fifteen steps."""
    losses = pretraining(generator)
    losses[200:215] += 4.0
    return losses


def rise_at_first(generator: np.random.Generator) -> np.ndarray:
    """Full fine-tuning with fresh moments: a bump of a third of a nat while the rate rises."""
    steps = np.arange(150)
    return 2.0 + 0.35 * np.exp(-(((steps - 20) / 10) ** 2)) - 0.004 * steps + generator.normal(0, 0.2, size=150)


def reward_like(generator: np.random.Generator) -> np.ndarray:
    """A loss around zero that says little, as policy gradients have."""
    return generator.normal(0, 0.3, size=300)


def few_hard_steps(generator: np.random.Generator) -> np.ndarray:
    """One step in twenty is of a hard row; the best lies in a stretch without any, where there is hardly any noise."""
    return np.where(generator.random(600) < 0.05, 8.0, 0.5) + generator.normal(0, 0.1, size=600)


ORDINARY = [fine_tuning, pretraining, spike, rise_at_first, reward_like, few_hard_steps]


@pytest.mark.parametrize("losses", ORDINARY, ids=lambda make: make.__name__)
def test_it_is_silent_on_ordinary_runs(losses: Callable):
    assert [stopped_at(losses(np.random.default_rng(seed))) for seed in SEEDS] == [None] * len(SEEDS)


def test_it_stops_a_run_that_does_not_come_back():
    """Up to the loss of knowing nothing, in the middle of a good run: noticed within 50 steps of 400."""
    for seed in SEEDS:
        losses = pretraining(np.random.default_rng(seed))
        losses[200:] += 5.5
        step = stopped_at(losses)
        assert step is not None and 200 + PATIENCE_STEPS <= step < 250, (seed, step)


@pytest.mark.parametrize("first", [1, 3, 8])
def test_it_stops_a_run_that_explodes_before_it_has_learnt(first: int):
    for seed in SEEDS:
        generator = np.random.default_rng(seed)
        losses = np.concatenate([generator.normal(2.0, 0.3, size=first), generator.normal(11.0, 0.7, size=80)])
        step = stopped_at(losses)
        assert step is not None and step < first + 4 * PATIENCE_STEPS, (seed, step)


def test_figures_by_hand():
    watch = LossWatch()
    watch.observe(2.0)
    watch.observe(1.0)
    # Averages 0.2 and 0.9 * 0.2 + 0.1 * 1.0 = 0.28, divided by 0.1 and 0.19; the second loss was 1 below the smoothed 2.
    assert watch.smoothed == pytest.approx(0.28 / 0.19)
    assert watch.noise == pytest.approx(1.0)
    # The mean of no noise and of this, which is a hundredth of it divided by 1 - 0.99 * 0.99.
    assert watch.usual_noise == pytest.approx(0.01 / 0.0199)
    assert watch.best is None
    assert watch.limit == pytest.approx(2 * 2.0 + 4 * 1.0)
    for _ in range(8):
        assert watch.best is None
        watch.observe(1.0)
    assert watch.best == pytest.approx(watch.smoothed)
    # The best lies in the quiet at the end.
    assert watch.noise_at_best < watch.usual_noise
    assert watch.limit == pytest.approx(watch.best + 4 * watch.usual_noise)


def test_it_judges_alike_after_a_checkpoint():
    losses = pretraining(np.random.default_rng(0))
    losses[200:] += 5.5
    watch, stopped = LossWatch(), []
    for step, loss in enumerate(losses, start=1):
        if watch.observe(float(loss)):
            stopped.append(step)
        watch = LossWatch(**json.loads(json.dumps(asdict(watch))))
    assert stopped[0] == stopped_at(losses)


CLIMBING = replace(CONFIG, num_epochs=60, schedule="constant", save_steps=4)


def climbs_from_step_25(run: Run) -> Callable[[dict[str, torch.Tensor]], LossSum]:
    def objective(tensors: dict[str, torch.Tensor]) -> LossSum:
        result = sft.loss(tensors)
        if run.step_done() < 24:
            return result
        # The gradient climbs, and the value is that of the climb.
        return replace(result, loss_sum=2 * result.loss_sum.detach() - result.loss_sum)

    return objective


def test_a_diverged_run_stops_names_its_rows_and_keeps_the_last_good_checkpoint(tiny_model: Callable, tmp_path: Path):
    """The planted divergence: from step 25 on the objective pushes the loss up instead of down."""
    run = Run(tiny_model, tmp_path, config=CLIMBING)
    with pytest.raises(TrainingError, match=r"diverged: .* since step (\d+) \(rows \[row") as caught:
        run.go(objective=climbs_from_step_25(run))
    assert "learning_rate" in caught.value.remedy
    began = int(caught.value.message.split("since step ")[1].split()[0])
    assert 24 < began <= run.step_done() - PATIENCE_STEPS + 1
    # Saved every fourth step until the loss became a worry, and then no more.
    assert run.saved[-1] == (began - 1) // 4 * 4
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-{step:08d}" for step in run.saved[-2:]]
    _, state = load_checkpoint(list_checkpoints(tmp_path)[-1])
    assert state["watch"]["num_worried"] == 0


def has_worried(run: Run, num_steps: int) -> bool:
    """Whether the run's last steps, so many of them, were a worry."""
    watch = LossWatch()
    for _, loss in sorted(run.losses().items()):
        watch.observe(loss)
    return watch.num_worried >= num_steps


def test_a_run_that_is_stopped_while_it_diverges_keeps_its_good_checkpoints(tiny_model: Callable, tmp_path: Path):
    """Asked to leave in the fifth step that is a worry: these steps are done again, and nothing bad is saved."""
    run = Run(tiny_model, tmp_path, config=CLIMBING)
    with pytest.raises(Interrupted):
        run.go(objective=climbs_from_step_25(run), should_stop=lambda: has_worried(run, 5))
    last_good = run.step_done() - 5
    assert run.saved[-1] == last_good // 4 * 4
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-{step:08d}" for step in run.saved[-2:]]
    assert load_checkpoint(list_checkpoints(tmp_path)[-1])[1]["watch"]["num_worried"] == 0
    assert [event for event in run.events if f"the checkpoint of step {run.saved[-1]} is kept" in event.message]


def test_a_run_that_is_stopped_while_it_diverges_saves_where_it_has_nothing_else(tiny_model: Callable, tmp_path: Path):
    run = Run(tiny_model, tmp_path, config=replace(CLIMBING, save_steps=None))
    with pytest.raises(Interrupted):
        run.go(objective=climbs_from_step_25(run), should_stop=lambda: has_worried(run, 5))
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-{run.step_done():08d}"]


def test_a_row_whose_own_loss_is_no_number_is_named_alone(tiny_model: Callable, tmp_path: Path):
    """The embedding of one token is broken, and one row has that token."""
    run = Run(tiny_model, tmp_path, config=replace(CONFIG, max_tokens_per_pack=1000, batch_rows=8))
    given = run.rows
    broken = 299
    given[2].input_ids[:] = np.where(np.arange(len(given[2])) == 3, broken, given[2].input_ids)
    given = [replace(row, input_ids=np.where(row.input_ids == broken, 5, row.input_ids)) if row is not given[2] else row for row in given]
    run.rows = [replace(row, name=f"letter-{index}") for index, row in enumerate(given)]
    run.prepare = lambda model: model.get_input_embeddings().weight.data[broken].fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"step 1 \(loss nan.*rows \[letter-2\]\)"):
        run.go()
