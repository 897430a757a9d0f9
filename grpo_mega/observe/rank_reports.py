"""Gathers what every rank measured in a step on rank 0: phases, its process, and the hardware of its node.

Asserted by tests/unit/observe/test_rank_reports.py and, with several ranks, tests/parallel/test_rank_reports.py.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch.distributed as dist

from grpo_mega.observe.atomic_files import to_json
from grpo_mega.observe.engine_metrics import EngineWork, engine_metrics, wait_metrics
from grpo_mega.observe.hardware.gpu import open_gpus
from grpo_mega.observe.hardware.host import NodeReader, ProcessReader
from grpo_mega.observe.hardware.reduction import gpu_metrics, host_metrics, rank_metrics
from grpo_mega.observe.hardware.sampler import NodeReading, NodeSampler
from grpo_mega.observe.rollout_files.columns import RolloutColumns
from grpo_mega.observe.timers import PhaseTimer

MAX_TIMELINE_RANKS = 16
"""Ranks per step in the timeline: rank 0, the slowest one, and others at equal distances."""

MeasureWork = Callable[[], "RankWork"]
"""Returns the work since the last call."""


@dataclass(frozen=True)
class RankWork:
    """Work of a rank in a step, and the seconds in which it waited for no other model copy or engine replica.

    Attributes:
        passes: forward and backward passes of policy and critic, until their gradients are reduced.
        sampling: sampling of the rollouts of the step on this rank's engine.
        last_answers: part of `sampling` in which only the last rollouts were left.
        engine: work of the engine, on the first rank of each prompt shard.
    """

    passes: float = 0.0
    sampling: float = 0.0
    last_answers: float = 0.0
    engine: EngineWork | None = None


@dataclass(frozen=True)
class RankReport:
    """Measurements of one rank in one step.

    Attributes:
        started: wall-clock time of the start of the step, in seconds since 1970.
        spans: (phase, start, seconds), starts from `started`.
        seconds: length of the step on this rank.
        shown: its rollouts of the groups that TensorBoard shows.
        work: seconds in which the rank did not wait for others, and the work of its engine.
        process: values of the rank's process.
        node: values of the node, on one rank of each node.
    """

    rank: int
    hostname: str
    started: float
    spans: tuple[tuple[str, float, float], ...]
    work: RankWork = field(default_factory=RankWork)
    process: Mapping[str, float] = field(default_factory=dict)
    node: NodeReading | None = None
    seconds: float = 0.0
    shown: RolloutColumns | None = None

    def phase_seconds(self) -> dict[str, float]:
        """Return the seconds of each phase."""
        found: dict[str, float] = {}
        for phase, _, seconds in self.spans:
            found[phase] = found.get(phase, 0.0) + seconds
        return found


class RankReporter:
    """Measures this rank, and gathers the reports of all ranks once per step.

    Args:
        rank: this rank.
        world_size: all ranks of the job.
        timers: phases of this rank.
        num_gpus: GPUs that this process sees.
        environment: LOCAL_RANK 0 has the sampler of its node.
        measure_work: measures the work of this rank.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        timers: PhaseTimer,
        *,
        num_gpus: int,
        environment: Mapping[str, str] = os.environ,
        measure_work: MeasureWork = RankWork,
    ) -> None:
        self._rank, self._world_size, self._timers, self._seconds_of_work = rank, world_size, timers, measure_work
        self._process = ProcessReader()
        is_first_of_node = environment.get("LOCAL_RANK", "0") == "0"
        self._sampler = NodeSampler(open_gpus(num_gpus), NodeReader()) if is_first_of_node else None

    def gather(self, shown: RolloutColumns | None = None) -> list[RankReport]:
        """Return the reports of all ranks on rank 0, in their order, and an empty list elsewhere. Collective.

        Args:
            shown: rollouts of this rank that TensorBoard shows.
        """
        mine = replace(self._measure(), shown=shown)
        if self._world_size == 1:
            return [mine]
        found: list[RankReport | None] | None = [None] * self._world_size if self._rank == 0 else None
        dist.gather_object(mine, found, dst=0)
        return [report for report in found or () if report is not None]

    def close(self) -> None:
        """Stop the sampler."""
        if self._sampler is not None:
            self._sampler.close()

    def _measure(self) -> RankReport:
        seconds = self._timers.step_seconds()["step"]
        return RankReport(
            self._rank,
            socket.gethostname(),
            time.time() - seconds,
            tuple(self._timers.step_spans()),
            self._seconds_of_work(),
            self._process.read(),
            None if self._sampler is None else self._sampler.take(),
            seconds,
        )


def report_metrics(reports: Sequence[RankReport]) -> dict[str, float]:
    """Return the metrics of machines, ranks and engines of a step, from the reports of all ranks, rank 0 first.

    `rank/slowest_ratio` is the slowest rank's `passes` + `sampling`, over the median of the other ranks.
    """
    nodes = [report.node for report in reports if report.node is not None]
    found = {**gpu_metrics(nodes), **host_metrics(nodes)}
    found |= rank_metrics("host", [report.process for report in reports])
    if len(reports) == 1:
        del found["host/rank_memory_bytes_mean"]  # host/memory_bytes has it
    sampling = sum(report.work.sampling for report in reports)
    if sampling > 0:
        found["rollout/last_answers_fraction"] = sum(report.work.last_answers for report in reports) / sampling
    engines = [(report.work.engine, report.work.sampling) for report in reports]
    found |= engine_metrics([(engine, seconds) for engine, seconds in engines if engine is not None])
    found |= wait_metrics([(report.phase_seconds(), report.seconds, report.work.sampling) for report in reports])
    if len(reports) > 1:
        phases = [{f"{k}_seconds": v for k, v in report.phase_seconds().items()} for report in reports]
        found |= rank_metrics("rank", phases)
        found |= _slowest([_seconds_of_work(report) for report in reports])
    return found


def _seconds_of_work(report: RankReport) -> float:
    return report.work.passes + report.work.sampling


def _slowest(own: Sequence[float]) -> dict[str, float]:
    if not any(own):
        return {}
    slowest = max(range(len(own)), key=own.__getitem__)
    others = statistics.median([seconds for rank, seconds in enumerate(own) if rank != slowest])
    ratio = own[slowest] / others if others > 0 else 1.0
    return {"rank/slowest": float(slowest), "rank/slowest_ratio": ratio, "rank/slowest_seconds": own[slowest]}


def append_timeline(path: Path, step: int, reports: Sequence[RankReport]) -> None:
    """Append a line with the phases of some ranks: `step`, `started`, `hosts` and `ranks`, rank -> [phase, start, s].

    Starts count from the earliest start of a rank. A step that is made again has a second line, which counts.
    """
    if not reports:
        return
    first = min(report.started for report in reports)
    chosen = _timeline_ranks(reports)
    line = {
        "step": step,
        "started": first,
        "hosts": {str(r.rank): r.hostname for r in chosen},
        "ranks": {
            str(r.rank): [[p, round(r.started - first + at, 4), round(s, 4)] for p, at, s in r.spans] for r in chosen
        },
    }
    with path.open("ab", buffering=0) as file:
        file.write(f"{to_json(line)}\n".encode())


def _timeline_ranks(reports: Sequence[RankReport]) -> list[RankReport]:
    if len(reports) <= MAX_TIMELINE_RANKS:
        return list(reports)
    slowest = max(range(len(reports)), key=lambda i: _seconds_of_work(reports[i]))
    spread = {round(i * (len(reports) - 1) / (MAX_TIMELINE_RANKS - 2)) for i in range(MAX_TIMELINE_RANKS - 1)}
    return [reports[i] for i in sorted(spread | {slowest})]
