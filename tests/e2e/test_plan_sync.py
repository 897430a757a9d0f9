"""tools/plan_sync.py: a reproducible plan from config files; invalid input ends with one message."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_mega.cli.plan_sync import main
from tests.helpers.jobs import REPOSITORY

KEYS = {
    "hash",
    "transfers",
    "bytes",
    "bytes_by_link",
    "lower_bound_bytes",
    "busiest_link_ratio",
    "peak_buffer_bytes",
    "predicted_seconds",
    "remedies",
}
LAYOUT = ["run.world_size=4", "parallel.tp=2", "parallel.pp=2", "engine.tp=2"]


def run_plan_sync(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/plan_sync.py", "configs/quickstart.yaml", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)


@pytest.mark.long
def test_the_quickstart_is_planned_for_four_ranks_and_compared_with_an_earlier_plan(tmp_path: Path) -> None:
    first = run_plan_sync(*LAYOUT, "--out", str(tmp_path / "plan.json"), "--json")
    assert first.returncode == 0, first.stderr
    summary = json.loads(first.stdout.splitlines()[-1])
    assert summary.keys() >= KEYS
    assert summary["busiest_link_ratio"] <= 1.05
    links = summary["bytes_by_link"]
    assert links["same_process"] + links["same_node"] == summary["bytes"]
    assert links["across_nodes"] == 0
    again = run_plan_sync(*LAYOUT, "--against", str(tmp_path / "plan.json"), "--json")
    repeated = json.loads(again.stdout.splitlines()[-1])
    assert (repeated["differences"], repeated["hash"]) == (0, summary["hash"])
    other = run_plan_sync(*LAYOUT[:3], "engine.tp=1", "--against", str(tmp_path / "plan.json"), "--json")
    assert json.loads(other.stdout.splitlines()[-1])["differences"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "set run.world_size=N"),
        (["run.world_size=4", "--gpus-per-node", "0"], "--gpus-per-node=0 must be more than 0"),
        (["run.world_size=4", "engine.kind=sglang"], "engine.kind=sglang is not supported"),
        (["run.world_size=4", "parallel.tp=3"], "run.world_size=4 is not a multiple of parallel.tp"),
    ],
)
def test_wrong_input_ends_with_one_message(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([str(REPOSITORY / "configs/quickstart.yaml"), *arguments]) == 2
    stderr = capfd.readouterr().err
    assert message in stderr
    assert "Traceback" not in stderr
