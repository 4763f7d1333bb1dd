"""The loss watchdog: when a run has diverged, and which rows made its loss no number.

A spike is no divergence: most spikes come back within some steps. So a run is stopped only when its smoothed loss stays far
above its best for `PATIENCE_STEPS` in a row, where "far" is measured against what the run had gained and against its own
noise. From the first worried step on no checkpoint is written, also where the run is asked to stop, so the good ones are not pushed
out by bad ones; only the run's end is saved, and where it leaves with nothing else on the disk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from giong.engine.step import evaluate_rows
from giong.models.rows import Row

SMOOTHING = 0.9
"""Of an exponential moving average: about ten steps."""
LONG_SMOOTHING = 0.99
"""Of the mean noise: about a hundred steps, so that the steps of a divergence hardly count."""
PATIENCE_STEPS = 20
WARM_UP_STEPS = 10
"""Before these the smoothed loss is too noisy to be called a best."""
LOST_GAIN, OF_START, OF_NOISE = 0.5, 0.25, 4.0
"""Far above the best: the largest of half of all that was gained, a quarter of the first loss, four deviations of a step (at the best, which
may lie in an easy stretch, or usually)."""
EXPLODED = 2.0
"""Times the first loss (and four deviations): the measure of a run that explodes before it has a best."""


@dataclass(slots=True)
class LossWatch:
    """Smoothed loss, its best and its noise: plain numbers, so that a checkpoint holds them and a resumed run judges alike."""

    num_steps: int = 0
    start: float = 0.0
    average: float = 0.0
    variance: float = 0.0
    best: float | None = None
    noise_at_best: float = 0.0
    num_worried: int = 0
    noise_average: float = 0.0

    def observe(self, loss: float) -> bool:
        """Take the loss of one step (finite); True when the run has diverged."""
        if self.num_steps == 0:
            self.start = loss
        else:
            self.variance += (1 - SMOOTHING) * ((loss - self.smoothed) ** 2 - self.variance)
        self.num_steps += 1
        self.noise_average += (1 - LONG_SMOOTHING) * (self.noise - self.noise_average)
        self.average += (1 - SMOOTHING) * (loss - self.average)
        self.num_worried = self.num_worried + 1 if self.smoothed > self.limit else 0
        if self.num_steps >= WARM_UP_STEPS and (self.best is None or self.smoothed < self.best):
            self.best, self.noise_at_best = self.smoothed, self.noise
        return self.num_worried >= PATIENCE_STEPS

    @property
    def smoothed(self) -> float:
        """The moving average without its bias towards zero (Kingma and Ba 2014, 1412.6980, section 3)."""
        return self.average / (1 - SMOOTHING**self.num_steps)

    @property
    def noise(self) -> float:
        """Standard deviation of one step's loss around the smoothed loss."""
        return math.sqrt(self.variance / (1 - SMOOTHING ** (self.num_steps - 1))) if self.num_steps > 1 else 0.0

    @property
    def usual_noise(self) -> float:
        """The long mean of `noise`, without its bias towards zero."""
        return self.noise_average / (1 - LONG_SMOOTHING**self.num_steps) if self.num_steps else 0.0

    @property
    def limit(self) -> float:
        """The smoothed loss above which a step is a worry."""
        exploded = EXPLODED * abs(self.start) + OF_NOISE * self.noise
        if self.best is None:
            return exploded
        far = max(LOST_GAIN * (self.start - self.best), OF_START * abs(self.start), OF_NOISE * max(self.noise_at_best, self.usual_noise))
        return min(exploded, self.best + far)

    @property
    def best_or_start(self) -> float:
        """What the loss is compared with."""
        return self.start if self.best is None else min(self.start, self.best)

    @property
    def is_worried(self) -> bool:
        return self.num_worried > 0


def rows_without_a_finite_loss(model: PreTrainedModel, rows: Sequence[Row]) -> list[int]:
    """Which of these rows have a loss that is no number all by themselves, one forward pass each."""
    training = model.training
    model.eval()
    try:
        return [index for index, row in enumerate(rows) if not torch.isfinite(evaluate_rows(model, [row], len(row))[0]).all()]
    finally:
        model.train(training)
