"""Measurements of real ranks: a slow rank is named by its own work, although all ranks finish an update together."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from grpo_mega.observe.rank_reports import RankReport, RankReporter, RankWork, report_metrics
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.types import Microbatch
from tests.helpers.recorded_rollouts import LOSS, Layout, Recorded, make_rows, open_policy, with_recorded
from tests.parallel.conftest import Laboratory

DELAY = 0.5
SLOW = 1


def update_with_a_slow_rank(rank: int, recorded: Recorded, layout: Layout) -> list[RankReport]:
    policy = open_policy(rank, recorded, layout)
    batch = with_recorded(make_rows(rank, recorded, layout), recorded)

    def loss(log_probs: Tensor, entropy: Tensor, microbatch: Microbatch) -> Any:
        time.sleep(DELAY if rank == SLOW else 0.0)
        return LOSS(log_probs, entropy, microbatch)

    timers = PhaseTimer()
    reporter = RankReporter(
        rank, layout.world, timers, num_gpus=0, environment={"LOCAL_RANK": str(rank)},
        measure_work=lambda: RankWork(passes=policy.take_work_seconds()),
    )  # fmt: skip
    policy.update(batch.microbatches, LOSS, 0.0)  # the first update allocates
    reporter.gather()
    timers.start_step()
    with timers.phase("train"):
        policy.update(batch.microbatches, loss, 0.0)
    reports = reporter.gather()
    reporter.close()
    return reports


def test_a_slow_rank_is_named_although_the_others_wait_for_it(laboratory: Laboratory) -> None:
    layout = Layout(4)
    answers = laboratory.pool.call(4, update_with_a_slow_rank, laboratory.recorded("deep"), layout)
    assert answers[1:] == [[], [], []]
    reports = answers[0]
    assert [report.rank for report in reports] == [0, 1, 2, 3]
    found = report_metrics(reports)
    assert found["rank/train_seconds_min"] > DELAY, "all ranks end the update together"
    assert found["rank/slowest"] == SLOW
    assert found["rank/slowest_seconds"] > DELAY
    assert max(report.work.passes for report in reports if report.rank != SLOW) < found["rank/slowest_seconds"] / 2
    assert "host/cpu_utilization_mean" in found
    assert [report.node is not None for report in reports] == [True, False, False, False]
