"""A whole job of two short steps with SGLang as its engine."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.engine_contract import sglang_here
from tests.helpers.jobs import SMALL, read_json, read_lines, rollouts_of, run_job_successfully


@sglang_here
def test_two_steps_with_sglang_sample_from_the_newest_weights_and_match_the_policy(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = (*SMALL, "engine.kind=sglang", "train.steps=2", f"run.dir={run}")
    run_job_successfully(*arguments, output=tmp_path / "log", timeout_seconds=500)
    summary = read_json(run / "summary.json")
    assert (summary["status"], summary["versions"]["sglang"]) == ("done", "0.5.23")
    lines = read_lines(run / "metrics.jsonl")
    assert max(line["train/mismatch_max"] for line in lines) <= 1e-4
    for line in lines:
        rows = rollouts_of(run, line["step"])
        assert len(rows) == 32
        assert {row["policy_version"] for row in rows} == {2 * (line["step"] - 1)}  # two updates a step
        assert {row["stop_reason"] for row in rows} <= {"eos", "length"}
    assert len({tuple(row["completion_ids"]) for row in rows}) > 4
    assert (run / "logs" / "sglang_00000.log").is_file()
