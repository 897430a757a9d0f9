"""tools/bench_host.py at a small size: the measured rank does the work of a real one, and the numbers are reported."""

from __future__ import annotations

import json
import sys

import pytest

from tools import bench_host


def test_a_rank_builds_the_rows_of_its_part_of_the_plan() -> None:
    case = bench_host.prepare(8, 5, 32, 40)
    groups = bench_host.sample(case)
    assert len(groups.table) == 256
    assert groups.tokens.ids.tolist() == [i for i in range(256) if i // bench_host.GROUP % 8 == 5]
    assert (groups.table.completion_tokens[groups.tokens.ids] + 64 == groups.tokens.lengths).all()
    batch = bench_host.build(case, groups)
    trained = {i for row in batch.microbatches for i in row.rollout_ids}
    assert trained == set((batch.plan.trainer == 5).nonzero()[0].tolist())
    assert sum(row.num_loss_tokens for row in batch.microbatches) == groups.table.loss_tokens[list(trained)].sum()
    assert bench_host.report(groups, batch)["rollout/tokens"] == groups.table.completion_tokens.sum()


def test_the_command_reports_every_case(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench_host", "--ranks", "8", "--rollouts-per-rank", "16", "--tokens", "40", "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    bench_host.main()
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert [(c["ranks"], c["rank"], c["rollouts"]) for c in found["cases"]] == [(8, 0, 128), (8, 7, 128)]
    assert found["measured"] == max(c["cpu_seconds"] for c in found["cases"])
    assert found["ratio"] == pytest.approx(found["measured"] / 1.5)
    assert len(lines) == 3
    for case in found["cases"]:
        own, share = case["own_resident_over_share"], case["share_bytes"]
        assert own * share == pytest.approx(case["resident_over_share"] * share - case["all_rollouts_bytes"])
        assert 80 < case["all_rollouts_bytes"] / 128 < 110


def test_a_number_of_rollouts_that_does_not_fit_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_host", "--ranks", "8", "--rollouts-per-rank", "17"])
    assert bench_host.main() == 2
    assert "--rollouts-per-rank=17" in capsys.readouterr().err
