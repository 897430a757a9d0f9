"""Runs whose real vLLM engine fails in the middle of a step: it is rebuilt, and the run equals one without failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.jobs import SMALL, read_json, read_lines, rollouts_of, run_job, without_times

KEYS = (*SMALL, "reward.terms=[{name: tests.helpers.failing_engine.exact}]", "run.world_size=2", "train.steps=3")
PARTIAL = (
    "engine.tp=1",
    "sampling.temperature=2.0",
    "sampling.partial={oversubmit: 1.5, slice_tokens: 2, max_staleness: 4}",
)
DP, TP = ("engine.tp=1",), ("parallel.tp=2", "engine.tp=2")


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
    tmp_path: Path, layout: tuple[str, ...], kind: str, request_number: int, reason: str
) -> None:
    logs = {}
    failing = {"FAILING_ENGINE": kind, "FAILING_REQUEST": str(request_number)}
    for name, env in (("plain", {}), ("failed", failing)):
        ended = run_job(*KEYS, *layout, f"run.dir={tmp_path / name}", output=tmp_path / f"{name}.log", env=env)
        assert ended.code == 0, ended.stderr[-3000:]
        logs[name] = "".join(each.read_text() for each in (tmp_path / name / "logs").glob("rank_*"))
    assert "the engines are rebuilt (1 of 2)" in logs["failed"]
    assert reason in logs["failed"]
    assert "the engines are rebuilt" not in logs["plain"]
    digests = [read_json(tmp_path / name / "summary.json")["policy_digest"] for name in ("plain", "failed")]
    assert digests[0] == digests[1]
    plain, failed = (
        [without_times(line) for line in read_lines(tmp_path / name / "metrics.jsonl")] for name in ("plain", "failed")
    )
    assert plain == failed
    for step in (1, 2, 3):
        assert rollouts_of(tmp_path / "plain", step) == rollouts_of(tmp_path / "failed", step)


@pytest.mark.long
def test_an_engine_that_always_fails_ends_the_run_after_the_allowed_rebuilds(tmp_path: Path) -> None:
    keys = (*KEYS, "guard.max_engine_rebuilds=1", f"run.dir={tmp_path / 'run'}")
    ended = run_job(*keys, output=tmp_path / "log", env={"FAILING_ENGINE": "always"})
    assert ended.code == 1
    assert "sampling failed on rank 1: RuntimeError: the engine fails on purpose" in ended.stderr
    assert "rebuilt 1 times before, as often as guard.max_engine_rebuilds=1 allows" in ended.stderr
