"""grpo_mega.observe.rank_reports: metrics and the timeline of ranks whose times are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_mega.observe.hardware.sampler import NodeReading
from grpo_mega.observe.metric_table import require_known
from grpo_mega.observe.rank_reports import (
    MAX_TIMELINE_RANKS,
    RankReport,
    RankReporter,
    RankWork,
    append_timeline,
    report_metrics,
)
from grpo_mega.observe.timers import PhaseTimer


def report(rank: int, sampling: float, *, started: float = 1000.0, node: bool = False) -> RankReport:
    return RankReport(
        rank,
        f"host-{rank // 2}",
        started,
        (("rollout", 0.0, sampling), ("train", sampling, 2.0), ("rollout", sampling + 2, 0.5)),
        RankWork(passes=1.0, sampling=sampling, last_answers=0.25),
        {"rank_memory_bytes": 1e9 + rank, "open_files_fraction": 0.1},
        NodeReading(f"host-{rank // 2}", {"cpu_utilization": 0.5 + 0.1 * rank}) if node else None,
    )


def test_the_slowest_rank_is_named_with_its_ratio() -> None:
    found = report_metrics([report(0, 3.0, node=True), report(1, 11.0), report(2, 3.5, node=True), report(3, 3.0)])
    assert (found["rank/slowest"], found["rank/slowest_seconds"], found["rank/slowest_ratio"]) == (1.0, 12.0, 3.0)
    assert found["rank/rollout_seconds_max"] == 11.5
    assert found["rank/rollout_seconds_outlier_rank"] == 1.0
    assert found["rank/train_seconds_mean"] == 2.0
    assert found["rollout/last_answers_fraction"] == pytest.approx(4 * 0.25 / 20.5)
    assert found["host/cpu_utilization_outlier_node"] in (0.0, 1.0)
    assert found["host/rank_memory_bytes_max"] == 1e9 + 3
    require_known(found)


def test_one_rank_has_no_metrics_of_ranks() -> None:
    found = report_metrics([report(0, 3.0, node=True)])
    assert not any(name.startswith("rank/") for name in found)
    assert found["rollout/last_answers_fraction"] == pytest.approx(0.25 / 3)
    require_known(found)


def test_supervised_fine_tuning_has_no_sampling_time() -> None:
    found = report_metrics([RankReport(0, "a", 0.0, (), process={"rank_memory_bytes": 1.0})])
    assert "rollout/last_answers_fraction" not in found


def test_the_timeline_counts_from_the_earliest_start(tmp_path: Path) -> None:
    path = tmp_path / "timeline.jsonl"
    append_timeline(path, 7, [report(0, 3.0), report(1, 3.0, started=1000.5)])
    append_timeline(path, 8, [report(0, 3.0)])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [7, 8]
    assert lines[0]["started"] == 1000.0
    assert lines[0]["ranks"]["1"] == [["rollout", 0.5, 3.0], ["train", 3.5, 2.0], ["rollout", 5.5, 0.5]]
    assert lines[0]["hosts"] == {"0": "host-0", "1": "host-0"}


def test_the_timeline_of_many_ranks_has_the_first_and_the_slowest(tmp_path: Path) -> None:
    reports = [report(rank, 9.0 if rank == 777 else 3.0) for rank in range(1024)]
    append_timeline(tmp_path / "timeline.jsonl", 1, reports)
    line = (tmp_path / "timeline.jsonl").read_text()
    ranks = {int(rank) for rank in json.loads(line)["ranks"]}
    assert len(ranks) == MAX_TIMELINE_RANKS
    assert {0, 777, 1023} <= ranks
    assert len(line) < 10_000


def test_a_rank_measures_itself_and_the_first_rank_of_a_node_its_node() -> None:
    timers = PhaseTimer()
    timers.start_step()
    with timers.phase("train"):
        pass
    own = RankWork(passes=3.0)
    first = RankReporter(0, 1, timers, num_gpus=0, environment={"LOCAL_RANK": "0"}, measure_work=lambda: own)
    second = RankReporter(0, 1, timers, num_gpus=0, environment={"LOCAL_RANK": "1"})
    (of_first,), (of_second,) = first.gather(), second.gather()
    first.close()
    second.close()
    assert of_first.work == own
    assert of_first.phase_seconds().keys() == {"train"}
    assert of_first.node is not None
    assert "cpu_utilization" in of_first.node.host
    assert of_second.node is None
