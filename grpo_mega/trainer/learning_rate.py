"""Learning rate of every update: a linear warm-up, then a constant rate or a decay to a minimum.

The rate is a function of the number of updates so far, which a checkpoint holds, so a schedule has no state of its own.
Megatron-Core's OptimizerParamScheduler is not used: it counts steps in a state that would have to be saved, gives the
first update of a warm-up the rate 0, and writes weight decay of its own into the groups of parameters. The rates of
its decays are the same.
Asserted by tests/unit/trainer/test_learning_rate.py, against that class as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from grpo_mega.config.policy_sections import LearningRateShape, OptimizerConfig
from grpo_mega.config.schema import TrainConfig


@dataclass(frozen=True)
class LearningRateSchedule:
    """Learning rates of one run. `warmup` and `decay_end` are numbers of updates since the start of the run."""

    shape: LearningRateShape
    peak: float
    minimum: float
    warmup: int
    decay_end: int
    """Update from which the rate is `minimum`; not read by `constant`."""

    @staticmethod
    def of(optimizer: OptimizerConfig, train: TrainConfig) -> LearningRateSchedule:
        """Return the schedule of a config, with the values that depend on the number of updates of the run."""
        updates = train.num_updates
        return LearningRateSchedule(
            optimizer.shape,
            optimizer.lr,
            optimizer.min_lr,
            optimizer.warmup_of(updates),
            optimizer.decay_end_of(updates),
        )

    def rate(self, updates_done: int) -> float:
        """Return the learning rate of the next update.

        With k = `updates_done`, w = `warmup`, e = `decay_end` and x = min(1, (k - w) / (e - w)): while k < w the rate
        is peak * (k + 1) / w. After that it is peak (constant), minimum + (peak - minimum) * (1 - x) (linear), or
        minimum + (peak - minimum) * (1 + cos(pi * x)) / 2 (cosine).

        Source: cosine: SGDR, arXiv:1608.03983, equation 5, without restarts.
        """
        if updates_done < self.warmup:
            return self.peak * (updates_done + 1) / self.warmup
        if self.shape == "constant":
            return self.peak
        remaining = max(0.0, (self.decay_end - updates_done) / (self.decay_end - self.warmup))
        if self.shape == "cosine":
            remaining = (1 + math.cos(math.pi * (1 - remaining))) / 2
        return self.minimum + (self.peak - self.minimum) * remaining

    def describe(self) -> str:
        """Return the schedule as text for the log."""
        start = f"rises to {self.peak:g} over {self.warmup} update(s), then " if self.warmup else ""
        if self.shape == "constant":
            return f"{start}{'stays there' if start else f'{self.peak:g}'}"
        fall = f"{self.shape} decay to {self.minimum:g} at update {self.decay_end}"
        return f"{start}{fall}" if start else f"{self.peak:g}, {fall}"
