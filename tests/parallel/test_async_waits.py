"""Real ranks that wait for a thread of background sampling, watched by the launcher's part that finds stalled ranks."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo_mega.launch.stall_report import make_report
from grpo_mega.launch.stall_watch import StallLimits, StallWatch, has_stalled
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.parallel.array_collectives import ArrayCollectives
from grpo_mega.parallel.heartbeat import RankHeartbeat, make_heartbeats
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.parallel.topology import Topology
from grpo_mega.trainer.rollout_transfer import RolloutTransfer
from tests.helpers.async_runs import AsyncRun
from tests.helpers.ranks import RankPool

LIMIT, REPORT_SECONDS = 3.0, 10.0


class Launcher(threading.Thread):
    """Watches the ranks until they have stalled or `is_done` is set, and then writes the file `released`."""

    def __init__(self, folder: Path, pids: list[int]) -> None:
        super().__init__(daemon=True)
        self._watch = StallWatch(folder, pids, range(len(pids)), StallLimits(600.0, {"rollout": LIMIT}))
        self._released = folder / "released"
        self.is_done, self.report = threading.Event(), ""

    def run(self) -> None:
        deadline = time.monotonic() + LIMIT + REPORT_SECONDS
        while time.monotonic() < deadline and not self.is_done.wait(0.5):
            ranks = self._watch.statuses()
            if has_stalled(ranks):
                self.report = make_report(ranks, {})
                break
        self._released.touch()


def sample_a_step(rank: int, folder: Path, hangs: bool) -> tuple[str, float]:
    """Sample with a score that hangs, or with many slices; return the report, and the seconds of the step."""
    topology = Topology(2, engine_tp=2)  # two ranks have one server, which rank 0 uses
    transfer = RolloutTransfer(ArrayCollectives(Ranks(topology, topology.coordinates(rank), torch.device("cpu"))))
    heartbeat = RankHeartbeat(folder, rank)
    timers = PhaseTimer(heartbeat=heartbeat)
    run = AsyncRun(transfer, timers, slice_tokens=1)
    collect, begin = run.scorer.collect, time.monotonic()

    def hang() -> object:
        while not (folder / "released").exists():
            time.sleep(0.05)
        return collect()

    if hangs:
        run.scorer.collect = hang  # type: ignore[method-assign, assignment]
    else:
        run.engine.hook = lambda: time.sleep(1.0)
    pids = transfer.collectives.gather(np.array([float(os.getpid())])).astype(int).ravel().tolist()
    launcher = Launcher(folder, pids)
    if rank == 1:
        launcher.start()
    try:
        with timers.phase("rollout"):
            run.sample(1)
    finally:
        launcher.is_done.set()
        run.sampler.close()
        heartbeat._stop()
    return launcher.report, time.monotonic() - begin


@pytest.mark.parametrize("hangs", [True, False])
def test_a_score_that_hangs_is_named_although_the_ranks_that_wait_enter_collectives(
    rank_pool: RankPool, tmp_path: Path, hangs: bool
) -> None:
    make_heartbeats(tmp_path, 2)
    report, seconds = rank_pool.call(2, sample_a_step, tmp_path, hangs)[1]
    assert seconds > LIMIT
    if not hangs:
        assert report == "", "slices are progress"
        return
    assert report.splitlines()[-1] == (
        f"launch: the job has stalled (limit of phase rollout: {LIMIT:g} s; guard.phase_limits): rank 0 makes no "
        "progress; waiting for it: 1"
    )
    assert "in phase rollout, step 0 of this start, " in report
    assert "; it waits for the call of its thread scoring\n" in report
    assert "; it waits for other ranks\n" in report
