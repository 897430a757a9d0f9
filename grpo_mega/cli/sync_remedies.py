"""Changes of a config that make a weight sync faster, each with the predicted seconds before and after.

Seconds are those of the busiest link plus `ROUND_SECONDS` per round. Asserted by tests/unit/cli/test_sync_remedies.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from grpo_mega.config.schema import Config
from grpo_mega.planner.remedies import Change, as_overrides, changed
from grpo_mega.types import UserError

ROUND_SECONDS = 2e-3
"""Seconds of a round besides its bytes (docs/measurements/weight_sync.md: about 100 more rounds took 0.23 s longer)."""
HOST_TRANSPORTS = {"gloo": 0.46e9, "shared_memory": 0.72e9}
"""Bytes per second and rank of the transports through host memory, measured with four ranks on two cores
(docs/measurements/weight_sync.md). Machines with more cores are faster."""
LEAST_GAIN = 0.1
"""Smallest fraction of the seconds that a change must save."""
MOST_BUCKET_BYTES = 2**30
MOST_TRANSFERS_REPEATED = 1_000_000
"""Plans with more transfers are not made again for other layouts, unless `--search` is given."""

Summary = dict[str, Any]
Replan = Callable[[Config], Summary]
"""Returns the summary of the plan of a changed config; raises UserError if its layout does not divide the model."""


@dataclass(frozen=True)
class SyncRemedy:
    """A change and its predicted effect."""

    change: Change
    before_seconds: float
    after_seconds: float
    effect: str

    @property
    def text(self) -> str:
        """The line that is printed."""
        seconds = f"{self.before_seconds:.3f} to {self.after_seconds:.3f} s"
        return f"{' '.join(as_overrides(self.change))}: {seconds}; {self.effect}"

    def as_json(self) -> dict[str, Any]:
        """Return the entry of `remedies` of `tools/plan_sync.py --json`."""
        return {
            "overrides": as_overrides(self.change),
            "before_seconds": self.before_seconds,
            "after_seconds": self.after_seconds,
            "effect": self.effect,
        }


def sync_seconds(summary: Summary, transport: str) -> float:
    """Return the predicted seconds of a sync over a transport, with its rounds.

    Args:
        summary: what `tools/plan_sync.py --json` prints.
        transport: `weight_sync.transport`. Those through the host are not faster than their measured speed.
    """
    speeds = {link: 1e9 * speed for link, speed in summary["speeds_gb_per_second"].items()}
    slowest = HOST_TRANSPORTS.get(transport, math.inf)
    busiest = summary["busiest_link_bytes"]
    moved = max(busiest[link] / min(speeds[link], slowest) for link in speeds)
    return float(moved + summary["buckets"] * ROUND_SECONDS)


def remedies(config: Config, summary: Summary, replan: Replan, *, on_cpu: bool, search: bool) -> list[SyncRemedy]:
    """Return the changes that save at least `LEAST_GAIN` of the seconds, the largest saving first.

    Args:
        config: the run.
        summary: of its plan.
        replan: plans a changed config.
        on_cpu: the machines have no GPUs, so the transport is through the host.
        search: plan other layouts also if one plan takes long.
    """
    transport = config.weight_sync.transport
    before = sync_seconds(summary, transport)
    found = [_larger_buckets(config, summary, before)]
    if not on_cpu:
        found.append(_faster_transport(summary, transport, before))
    if search or summary["transfers"] <= MOST_TRANSFERS_REPEATED:
        found += _engine_layouts(config, summary, replan, before)
    gains = [each for each in found if each is not None and each.after_seconds <= (1 - LEAST_GAIN) * before]
    return sorted(gains, key=lambda each: (each.after_seconds, each.text))


def _larger_buckets(config: Config, summary: Summary, before: float) -> SyncRemedy | None:
    """Return the smallest bucket, in powers of two, with which the rounds take at most `LEAST_GAIN` of the seconds."""
    size, rounds = config.weight_sync.bucket_bytes, summary["buckets"]
    in_bytes = before - rounds * ROUND_SECONDS
    larger, fewer = size, rounds
    while 2 * larger <= MOST_BUCKET_BYTES and fewer > 1 and fewer * ROUND_SECONDS > LEAST_GAIN * in_bytes:
        larger, fewer = 2 * larger, math.ceil(rounds * size / (2 * larger))
    if larger == size:
        return None
    return SyncRemedy(
        {"weight_sync.bucket_bytes": larger},
        before,
        in_bytes + fewer * ROUND_SECONDS,
        f"about {fewer} instead of {rounds} rounds, and at most {2 * larger / 1e6:.0f} MB of buffers on each rank",
    )


def _faster_transport(summary: Summary, transport: str, before: float) -> SyncRemedy | None:
    """Return the change from a transport through the host to the GPUs' own."""
    if transport not in HOST_TRANSPORTS:
        return None
    speeds = summary["speeds_gb_per_second"]
    return SyncRemedy(
        {"weight_sync.transport": "auto"},
        before,
        sync_seconds(summary, "auto"),
        f"NCCL at {speeds['same_node']:g} and {speeds['across_nodes']:g} GB/s instead of {transport} at "
        f"{HOST_TRANSPORTS[transport] / 1e9:g} GB/s",
    )


def _engine_layouts(config: Config, summary: Summary, replan: Replan, before: float) -> list[SyncRemedy]:
    """Return the changes of engine.tp to the policy's tp, its half and its double that can be planned."""
    engine, found = config.engine, []
    for tp in sorted({config.parallel.tp, engine.tp // 2, 2 * engine.tp} - {0, engine.tp}):
        change: Change = {"engine.tp": tp} | ({"engine.ep": tp * engine.dp} if engine.ep > 1 else {})
        try:
            other = replan(changed(config, change))
        except UserError:
            continue
        links, were = other["bytes_by_link"], summary["bytes_by_link"]
        found.append(
            SyncRemedy(
                change,
                before,
                sync_seconds(other, config.weight_sync.transport),
                f"{links['across_nodes'] / 1e9:.1f} instead of {were['across_nodes'] / 1e9:.1f} GB between nodes, "
                f"{links['same_node'] / 1e9:.1f} instead of {were['same_node'] / 1e9:.1f} GB inside nodes; plan.py has "
                "the seconds of sampling and the memory with this change",
            )
        )
    return found
