"""Computes the metrics of one step of supervised fine-tuning. Pure. Asserted by tests/unit/trainer/test_sft_loop.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from grpo_mega.data.example_dataset import Example
from grpo_mega.trainer.guard_report import GuardReport
from grpo_mega.trainer.step_metrics import update_metrics
from grpo_mega.types import UpdateStats

_MAX_LOSS = 700.0  # exp of more overflows


@dataclass(frozen=True)
class ExampleStepResult:
    """Results of a step; equal on every rank except for `state_bytes`."""

    step: int
    examples: Sequence[Example]
    updates: Sequence[UpdateStats]
    state_bytes: Mapping[str, int] = field(default_factory=dict)
    checkpoint_wait_seconds: float = 0.0
    guard: GuardReport = field(default_factory=GuardReport)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the examples, without padding."""
        return sum(len(example.token_ids) for example in self.examples)

    def metrics(self) -> dict[str, float]:
        """Return all metrics except times and throughput. observe/metric_table.py describes each name."""
        found = update_metrics(self.updates)
        return {
            **found,
            **self.guard.metrics,
            "train/perplexity": math.exp(min(found["train/loss"], _MAX_LOSS)),
            "train/num_tokens": float(self.num_tokens),
            "train/num_loss_tokens": float(sum(example.num_loss_tokens for example in self.examples)),
            "time/checkpoint_wait_seconds": self.checkpoint_wait_seconds,
            **{f"memory/{name}_bytes": float(size) for name, size in self.state_bytes.items()},
        }
