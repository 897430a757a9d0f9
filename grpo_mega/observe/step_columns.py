"""The line of a step: aligned columns of the numbers that matter, at most 80 characters wide up to step 999.

Asserted by tests/unit/observe/test_step_columns.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from grpo_mega.observe.summary import duration


@dataclass(frozen=True)
class Column:
    """A column: the metric that it shows, its label, its width in characters and the format of its numbers."""

    metric: str
    label: str
    width: int
    spec: str


HELD_OUT = "eval/accuracy"
_COLUMNS = (
    Column("train/perplexity", "perplexity", 10, ".3f"),
    Column("reward/mean", "reward", 6, ".2f"),
    Column(HELD_OUT, "held-out", 8, ".3f"),
    Column("train/entropy", "entropy", 7, ".3f"),
    Column("train/mismatch_max", "mismatch", 8, ".1g"),
    Column("train/kl", "kl", 6, "#.2g"),
    Column("rollout/length_mean", "length", 6, ".1f"),
    Column("rollout/truncated_fraction", "trunc", 5, ".0%"),
    Column("train/learning_rate", "rate", 7, ".2g"),
    Column("throughput/tokens_per_second", "tok/s", 6, ",.0f"),
    Column("time/step_seconds", "s", 5, ".1f"),
)
_ONLY_WITHOUT_REWARDS = ("train/learning_rate",)


class StepColumns:
    """Columns of the steps of a run: those whose metrics the steps have.

    Args:
        total_steps: last step of the run.
    """

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps

    def header(self, metrics: Mapping[str, float]) -> str:
        """Return the labels of the columns of a step with these metrics."""
        labels = [f"{column.label:>{column.width}}" for column in self._shown(metrics)]
        return " ".join([f"{'step':>{self._step_width}}", *labels, f"{'ETA':>6}", " seconds by phase"])

    def row(self, step: int, metrics: Mapping[str, float], eta_seconds: float | None) -> str:
        """Return the numbers of a step, and the seconds of its phases beyond the columns."""
        cells = [f"{short_number(metrics[c.metric], c.spec):>{c.width}}" for c in self._shown(metrics)]
        eta = "" if eta_seconds is None else duration(eta_seconds).replace(" ", "")
        phases = phase_seconds(metrics)
        at = f"{step}/{self._total_steps}"
        line = " ".join([f"{at:>{self._step_width}}", *cells, f"{eta:>6}"])
        return (f"{line}  {phases}" if phases else line).rstrip()

    @property
    def _step_width(self) -> int:
        return max(4, 2 * len(str(self._total_steps)) + 1)

    @staticmethod
    def _shown(metrics: Mapping[str, float]) -> list[Column]:
        hidden = _ONLY_WITHOUT_REWARDS if "reward/mean" in metrics else ()
        return [column for column in _COLUMNS if column.metric in metrics and column.metric not in hidden]


def phase_seconds(metrics: Mapping[str, float]) -> str:
    """Return for example `rollout 0.9 train 1.0 sync 0.1`: the phases of a step that took at least 0.05 s."""
    return " ".join(
        f"{name.removeprefix('time/').removesuffix('_seconds')} {seconds:.1f}"
        for name, seconds in metrics.items()
        if name.startswith("time/") and name not in ("time/step_seconds", "time/checkpoint_wait_seconds")
        if seconds >= 0.05
    )


def short_number(value: float, spec: str) -> str:
    """Return for example `0.0012`, `1.2e-4` or `3e-7`."""
    if spec.endswith("g") and 0 < abs(value) < 1e-3:
        spec = f".{int(spec[:-1].lstrip('#.')) - 1}e"
    return format(value, spec).rstrip(".").replace("e-0", "e-").replace("e+0", "e+")
