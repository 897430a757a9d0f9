"""Traces and profiles of a run on this rank: `observe.trace` and `observe.profile_steps`.

Asserted by tests/e2e/test_trace.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from grpo_mega.config.schema import ObserveConfig
from grpo_mega.observe.run_folder import RunFolder
from grpo_mega.observe.trace.merge import merge_trace
from grpo_mega.observe.trace.recorder import TraceRecorder
from grpo_mega.parallel.clock_offset import measure_clock_offset
from grpo_mega.parallel.collective_spans import recording_collectives
from grpo_mega.parallel.ranks import Ranks

_CLOCK_STEPS = 100
"""Steps after which the offsets of the clocks are measured again: the clocks of machines drift."""
_MAX_SNAPSHOT_EVENTS = 200_000


class RunTrace:
    """Trace and profiles of one rank. Without both settings it does nothing.

    Args:
        config: `trace` and `profile_steps`.
        folder: the run folder.
        ranks: coordinates of this rank.
        stack: ends the recording.
    """

    def __init__(self, config: ObserveConfig, folder: RunFolder, ranks: Ranks, stack: ExitStack) -> None:
        self._folder, self._ranks, self._profile_steps = folder, ranks, frozenset(config.profile_steps)
        self.recorder: TraceRecorder | None = None
        """Recorder of this rank; None: no trace is recorded."""
        self._clocks: dist.ProcessGroup | None = None
        self._started_steps = 0
        if config.trace:
            path = folder.traces / f"rank-{ranks.rank:05d}.jsonl"
            self.recorder = TraceRecorder(path, ranks.topology.describe(ranks.rank))
            stack.callback(self.recorder.close)
            if ranks.topology.world_size > 1:
                self._clocks = dist.new_group(backend="gloo")
            self._set_clock()
            stack.enter_context(recording_collectives(self.recorder.record))

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Record a step, and profile it if it is one of `observe.profile_steps`. Collective."""
        if self.recorder is None:
            with self._profiled(step):
                yield
            return
        self._started_steps += 1
        if self._started_steps % _CLOCK_STEPS == 0:
            self._set_clock()
        with self._profiled(step), self.recorder.span(f"step {step}", "step"):
            yield
        self.recorder.flush()

    def finish(self) -> None:
        """Merge the traces of all ranks into one file. Collective."""
        if self.recorder is None:
            return
        self.recorder.close()
        if self._clocks is not None:
            dist.barrier(group=self._clocks)
        if self._ranks.is_first:
            merge_trace(self._folder.traces, self._folder.trace)

    def _set_clock(self) -> None:
        """Measure the offset from this rank's monotonic clock to the wall clock of the first rank. Collective."""
        assert self.recorder is not None, "only a recorder has a clock"
        wall, offset_ns, uncertainty_ns = torch.tensor([time.time_ns() - time.monotonic_ns()]), 0, 0
        if self._clocks is not None:
            dist.broadcast(wall, src=0, group=self._clocks)
            found = measure_clock_offset(self._clocks)
            offset_ns, uncertainty_ns = found.offset_ns, found.uncertainty_ns
        self.recorder.set_clock(offset_ns + int(wall), uncertainty_ns)

    @contextmanager
    def _profiled(self, step: int) -> Iterator[None]:
        if step not in self._profile_steps:
            yield
            return
        folder = self._folder.profile_of(step)
        folder.mkdir(parents=True, exist_ok=True)
        on_cuda = self._ranks.device.type == "cuda"
        activities = [torch.profiler.ProfilerActivity.CPU]
        memory: Any = torch.cuda.memory
        if on_cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            memory._record_memory_history(max_entries=_MAX_SNAPSHOT_EVENTS)
        try:
            with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
                yield
            _export(profile, folder / f"rank-{self._ranks.rank:05d}.json.gz")
            if on_cuda:
                memory._dump_snapshot(str(folder / f"memory-rank-{self._ranks.rank:05d}.pickle"))
        finally:
            if on_cuda:
                memory._record_memory_history(enabled=None)


def _export(profile: torch.profiler.profile, path: Path) -> None:
    profile.export_chrome_trace(str(path))
