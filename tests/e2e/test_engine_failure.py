"""Runs whose real vLLM engine fails in the middle of a step: it is rebuilt, and the run equals one without failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.finished_runs import TWO_RANKS, TWO_RANKS_STEPS, ObservedRun
from tests.helpers.jobs import read_json, read_lines, rollouts_of, run_job, without_times

KEYS = (*TWO_RANKS, "reward.terms=[{name: tests.helpers.failing_engine.exact}]")
PARTIAL = (
    "sampling.temperature=2.0",
    "sampling.partial={oversubmit: 1.5, slice_tokens: 2, max_staleness: 4}",
)
DP: tuple[str, ...] = ()
TP = ("parallel.tp=2", "engine.tp=2")


@pytest.mark.parametrize(
    ("layout", "kind", "request_number", "reason"),
    [
        pytest.param(DP, "raises", 2, "RuntimeError: the engine fails on purpose", id="exception on one rank"),
        pytest.param(TP, "nan", 2, "which is no log-probability", id="invalid output", marks=pytest.mark.long),
        pytest.param(  # the fourth slice of a rank: later ones may have a single rollout
            PARTIAL, "raises", 4, "RuntimeError: the engine fails on purpose", id="partial", marks=pytest.mark.long
        ),
    ],
)
def test_the_engine_is_rebuilt_and_the_run_equals_one_without_the_failure(
    two_ranks: ObservedRun, tmp_path: Path, layout: tuple[str, ...], kind: str, request_number: int, reason: str
) -> None:
    failed = run(tmp_path / "failed", layout, {"FAILING_ENGINE": kind, "FAILING_REQUEST": str(request_number)})
    plain = two_ranks.folder if layout == DP else run(tmp_path / "plain", layout, {})
    logs = ["".join(each.read_text() for each in (folder / "logs").glob("rank_*")) for folder in (plain, failed)]
    assert "the engines are rebuilt" not in logs[0]
    assert "the engines are rebuilt (1 of 2)" in logs[1]
    assert reason in logs[1]
    digests = [read_json(folder / "summary.json")["policy_digest"] for folder in (plain, failed)]
    assert digests[0] == digests[1]
    lines = [[without_times(line) for line in read_lines(folder / "metrics.jsonl")] for folder in (plain, failed)]
    assert lines[0] == lines[1]
    assert len(lines[0]) == TWO_RANKS_STEPS
    for step in range(1, TWO_RANKS_STEPS + 1):
        assert rollouts_of(plain, step) == rollouts_of(failed, step)


def run(folder: Path, layout: tuple[str, ...], env: dict[str, str]) -> Path:
    ended = run_job(*KEYS, *layout, f"run.dir={folder}", output=folder.with_suffix(".log"), env=env)
    assert ended.code == 0, ended.stderr[-3000:]
    return folder


@pytest.mark.long
def test_an_engine_that_always_fails_ends_the_run_after_the_allowed_rebuilds(tmp_path: Path) -> None:
    keys = (*KEYS, "guard.max_engine_rebuilds=1", f"run.dir={tmp_path / 'run'}")
    ended = run_job(*keys, output=tmp_path / "log", env={"FAILING_ENGINE": "always"})
    assert ended.code == 1
    assert "sampling failed on rank 1: RuntimeError: the engine fails on purpose" in ended.stderr
    assert "rebuilt 1 times before, as often as guard.max_engine_rebuilds=1 allows" in ended.stderr
