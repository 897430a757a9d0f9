"""Simulates one job in all modes, chooses the best `oversubmit` and the best split of devices, and prints the table.

Asserted by tests/unit/cli/test_simulate_steps.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpo_mega.planner.simulation.asynchronous import AsynchronousRun
from grpo_mega.planner.simulation.lengths import AnswerLengths
from grpo_mega.planner.simulation.partial import PartialSettings, simulate_partial
from grpo_mega.planner.simulation.synchronous import simulate_synchronous
from grpo_mega.planner.simulation.workload import SimulatedJob, SimulatedMode, colocated_mode

OVERSUBMITS = (1.25, 1.5, 2.0, 3.0, 4.0)
STEPS, WARM_STEPS = 24, 8
STALENESS_STEPS = (1, 2, 4)
"""Values of `train.max_staleness` that are simulated, in steps."""
_MOST_SLOWDOWN = 1.01  # a smaller `oversubmit` is preferred if its steps are at most 1% slower


@dataclass(frozen=True)
class Simulation:
    """The simulated modes of a run.

    Attributes:
        lengths: lengths of the answers.
        synchronous: the run without `sampling.partial`.
        partial: `oversubmit` -> the run with this value; empty with engine servers.
        asynchronous: the run for each split of the devices that fits, with each bound of staleness.
        notes: reasons for modes that are missing.
    """

    lengths: AnswerLengths
    synchronous: SimulatedMode
    partial: dict[float, SimulatedMode]
    asynchronous: Sequence[SimulatedMode]
    notes: Sequence[str] = ()

    @property
    def best_oversubmit(self) -> float | None:
        """Smallest `oversubmit` whose steps are at most 1% slower than the fastest; None if there are none."""
        fastest = min((mode.step_seconds for mode in self.partial.values()), default=0.0)
        near = (value for value, mode in self.partial.items() if mode.step_seconds <= _MOST_SLOWDOWN * fastest)
        return min(near, default=None)

    @property
    def best_split(self) -> SimulatedMode | None:
        """The fastest asynchronous run; None if no split fits."""
        return min(self.asynchronous, key=lambda mode: mode.step_seconds, default=None)

    @property
    def _rows(self) -> list[SimulatedMode]:
        """Rows of the table: the synchronous run, all partial runs, and the fastest split for each `max_staleness`."""
        fastest: dict[str, SimulatedMode] = {}
        for mode in self.asynchronous:
            if mode.name not in fastest or mode.step_seconds < fastest[mode.name].step_seconds:
                fastest[mode.name] = mode
        return [self.synchronous, *self.partial.values(), *fastest.values()]

    def text(self) -> str:
        """Return the table and its conclusions."""
        found = self.lengths.summary()
        lines = [
            f"simulated steps, lengths of answers {self.lengths.name}: mean {found.mean:,.0f}, p50 {found.p50:,.0f}, "
            f"p99 {found.p99:,.0f} tokens (p99/p50 {found.p99 / found.p50:.1f}), {found.cut_fraction:.1%} cut at "
            f"{self.lengths.max_tokens:,}",
            f"  {'mode':<31} {'devices':>9} {'s/step':>8} {'s/update':>9} {'idle':>6} {'running':>8} "
            f"{'tokens/update':>14} {'staleness':>12} {'dropped':>8}",
        ]
        for mode in self._rows:
            devices = f"{mode.policy_devices}" + (f" + {mode.server_devices}" if mode.server_devices else "")
            lines.append(
                f"  {mode.name:<31} {devices:>9} {mode.step_seconds:8.1f} {mode.update_seconds:9.2f} "
                f"{mode.idle_share:6.1%} {mode.running:8.1f} {mode.tokens_per_update:14,.0f} "
                f"{f'{mode.staleness_mean:.2f} / {mode.staleness_max}':>12} {mode.dropped_groups:8.1f}"
            )
        return "\n".join([*lines, *(f"  {note}" for note in self.notes), *self._conclusions()])

    def _conclusions(self) -> list[str]:
        base, lines = self.synchronous.step_seconds, []
        if self.best_oversubmit is not None:
            gain = base / self.partial[self.best_oversubmit].step_seconds
            lines.append(f"best oversubmit: {self.best_oversubmit} ({gain:.2f} times the updates of synchronous steps)")
        split = self.best_split
        if split is not None:
            lines.append(
                f"best split: {split.policy_devices} devices for the policy, {split.server_devices} for servers, "
                f"{split.name} ({base / split.step_seconds:.2f} times the updates of synchronous steps)"
            )
        return lines

    def as_json(self) -> dict[str, Any]:
        """Return the object that `grpo-mega plan --lengths ... --json` prints under `simulation`."""
        split = self.best_split
        return {
            "lengths": {"source": self.lengths.name, **vars(self.lengths.summary())},
            "synchronous": self.synchronous.as_json(),
            "partial": [{"oversubmit": value, **mode.as_json()} for value, mode in self.partial.items()],
            "asynchronous": [mode.as_json() for mode in self.asynchronous],
            "best_oversubmit": self.best_oversubmit,
            "best_split": None if split is None else split.as_json(),
            "notes": list(self.notes),
        }


def simulate_colocated(
    job: SimulatedJob, settings: Sequence[PartialSettings], seed: int = 0
) -> tuple[SimulatedMode, dict[float, SimulatedMode]]:
    """Simulate synchronous steps, and steps with partial rollouts for each of the settings (`oversubmit` -> result)."""
    synchronous = colocated_mode(job, "synchronous", simulate_synchronous(job, STEPS, seed))
    partial = {
        each.oversubmit: colocated_mode(
            job,
            f"partial, oversubmit {each.oversubmit}",
            simulate_partial(job, each, WARM_STEPS + STEPS, seed)[WARM_STEPS:],
        )
        for each in settings
    }
    return synchronous, partial


def simulate_asynchronous(job: SimulatedJob, bounds: Sequence[int], seed: int = 0) -> list[SimulatedMode]:
    """Simulate a split of the devices with each `train.max_staleness` of `bounds`."""
    return [AsynchronousRun(job, bound, seed).run(STEPS, WARM_STEPS) for bound in bounds]
