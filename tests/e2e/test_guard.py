"""Runs in which the gradient of one step is not a number: they stop, skip it with its rollouts, or return to a
checkpoint. The prompts of step 3 are at fault (helpers/poisoned_prompts.py), in every attempt."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path

import psutil
import pytest

from grpo_mega.cli.rollouts import main as print_rollouts
from grpo_mega.observe.rollout_files.reader import read_rows
from grpo_mega.observe.run_folder import RunFolder
from tests.helpers.jobs import (
    SMALL,
    FinishedCommand,
    kill_with_children,
    read_json,
    read_lines,
    rollouts_of,
    run_job,
    running_job,
    without_times,
)

ENV = {"POISONED_STEP": "3"}
KEYS = (
    *SMALL,
    "reward.terms=[{name: tests.helpers.poisoned_prompts.exact}]",
    "run.world_size=1",
    "train.steps=4",
    "checkpoint.every=2",
    "checkpoint.keep=4",
)


def run(path: Path, output: Path, *keys: str, base: tuple[str, ...] = KEYS) -> FinishedCommand:
    return run_job(*base, f"run.dir={path}", *keys, output=output, env=ENV)


def guard_metrics(path: Path, name: str) -> list[float]:
    return [line[f"guard/{name}"] for line in read_lines(path / "metrics.jsonl")]


def prompts_of(path: Path, step: int) -> set[int]:
    return {row["prompt_index"] for row in rollouts_of(path, step)}


def test_the_run_stops_with_the_command_that_continues_past_the_step_and_that_command_does(tmp_path: Path) -> None:
    path = tmp_path / "run"
    stopped = run(path, tmp_path / "stopped")
    assert stopped.code == 1
    assert "Traceback" not in stopped.stderr
    last = [line for line in stopped.stderr.splitlines() if line.startswith("error: ")][-1]
    assert "step 3: the gradient norm is nan although every loss is finite" in last
    assert "guard.rules.non_finite=stop" in last
    arguments = shlex.split(last.partition("this command continues past it: launch/train.sh ")[2])
    assert arguments[-1] == "guard.rules.non_finite=rollback"
    assert read_json(path / "summary.json")["status"] == "failed"

    continued = run_job(*arguments, output=tmp_path / "continued", env=ENV)
    assert continued.code == 0, continued.stderr[-3000:]
    assert [line["step"] for line in read_lines(path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert guard_metrics(path, "rollbacks") == [0, 0, 1, 1]
    (rollback,) = [json.loads(line) for line in (path / "rollbacks.jsonl").read_text().splitlines()]
    assert (rollback["failed_step"], rollback["checkpoint_step"], rollback["rule"]) == (3, 2, "non_finite")
    assert "guard.rules.non_finite=rollback): the run returned to the checkpoint after step 2" in continued.stderr


def test_quarantine_skips_the_updates_writes_the_groups_and_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    ended = run(path, tmp_path / "log", "guard.rules.non_finite=quarantine")
    assert ended.code == 0, ended.stderr[-3000:]
    lines = read_lines(path / "metrics.jsonl")
    assert guard_metrics(path, "skipped_updates") == [0, 0, 2, 0]  # two minibatches
    assert guard_metrics(path, "quarantined_groups") == [0, 0, 8, 0]
    assert [line["train/updates"] for line in lines] == [2, 2, 0, 2]
    assert [line["train/grad_norm"] is None for line in lines] == [False, False, True, False]
    versions = [{row["policy_version"] for row in rollouts_of(path, step)} for step in (3, 4)]
    assert versions == [{4}, {4}]  # the weights of step 4 are those of step 3
    assert "the update is skipped (guard.rules.non_finite=quarantine)" in ended.stderr
    (folder,) = (path / "quarantine").iterdir()
    assert folder.name == "step_000003"
    assert read_rows(folder) == rollouts_of(path, 3)
    assert all(len(row["old_log_probs"]) == len(row["completion_ids"]) for row in read_rows(folder))
    reason = read_json(folder / "reason.json")
    assert reason["seed_of"] == ["train", 0, 3]
    assert set(reason["prompt_indices"]) == prompts_of(path, 3)
    assert len(reason["weights_digest"]) > 8
    assert {finding["rule"] for finding in reason["findings"]} == {"non_finite"}
    assert print_rollouts([str(path), "--quarantine", "--jsonl"]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert shown == json.loads(json.dumps(rollouts_of(path, 3)))


TWO_RANKS = (
    *KEYS,
    "run.world_size=2",
    "engine.tp=1",
    "train.steps=6",
    "checkpoint.every=3",
    "guard.rules.non_finite=rollback",
    "guard.timeout_seconds=120",
)
STEP_5 = {"POISONED_STEP": "5"}


def wait_for_rolled_back_step(metrics: Path, process: psutil.Popen) -> None:
    """Wait until the file has a line of a step after a rollback."""
    deadline = time.monotonic() + 400
    while not metrics.exists() or '"guard/rollbacks": 1.0' not in metrics.read_text():
        assert process.poll() is None, "the run ended"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.long  # the first test has a rollback of a whole run, test_resume.py a kill of two ranks
def test_a_rolled_back_run_that_is_killed_and_continued_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    """Two ranks. Step 5 returns to step 3; the kill is in step 5 of the second attempt, before the next checkpoint."""
    expected, path = tmp_path / "expected", tmp_path / "run"
    ended = run_job(*TWO_RANKS, f"run.dir={expected}", output=tmp_path / "uninterrupted", env=STEP_5)
    assert ended.code == 0, ended.stderr[-3000:]
    with running_job([*TWO_RANKS, f"run.dir={path}"], tmp_path / "killed", STEP_5) as process:
        wait_for_rolled_back_step(path / "metrics.jsonl", process)
        kill_with_children(process)
    assert list(RunFolder(path).complete_checkpoints()) == [0, 3], "it was killed too late"
    (discarded,) = (path / "discarded").iterdir()
    assert [line["step"] for line in read_lines(discarded / "metrics.jsonl")] == [4]
    recorded = (path / "rollbacks.jsonl").read_text()
    again = run_job(*TWO_RANKS, f"run.dir={path}", output=tmp_path / "continued", env=STEP_5)
    assert again.code == 0, again.stderr[-3000:]
    assert (path / "rollbacks.jsonl").read_text() == recorded, "step 5 failed again"
    lines = [[without_times(line) for line in read_lines(each / "metrics.jsonl")] for each in (path, expected)]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == [1, 2, 3, 4, 5, 6]
    assert [line["guard/rollbacks"] for line in lines[0]] == [0, 0, 0, 1, 1, 1]
    for step in range(1, 7):
        assert rollouts_of(path, step) == rollouts_of(expected, step)
    first_attempt = {row["prompt_index"] for row in read_rows(discarded / "rollouts" / "step_000004")}
    assert first_attempt.isdisjoint(prompts_of(path, 4))
    digests = [read_json(each / "summary.json")["policy_digest"] for each in (path, expected)]
    assert digests[0] == digests[1]


@pytest.mark.long  # tests/unit/trainer/test_run_guard.py has the limit, the first test a rollback to a later step
def test_a_failure_in_the_first_step_returns_to_the_state_before_it_and_the_limit_stops_the_run(tmp_path: Path) -> None:
    path = tmp_path / "run"
    keys = ("guard.rules.non_finite=rollback", "guard.max_rollbacks=0", "train.steps=1")
    stopped = run_job(*KEYS, f"run.dir={path}", *keys, output=tmp_path / "stopped", env={"POISONED_STEP": "1"})
    assert stopped.code == 1
    assert stopped.stderr.rstrip().endswith("guard.max_rollbacks=3")
    assert list(RunFolder(path).complete_checkpoints()) == [0]
    assert not (path / "rollbacks.jsonl").exists()
    arguments = shlex.split(stopped.stderr.rstrip().rpartition("launch/train.sh ")[2])
    continued = run_job(*arguments, output=tmp_path / "continued", env={"POISONED_STEP": "1"})
    assert continued.code == 0, continued.stderr[-3000:]
    assert guard_metrics(path, "rollbacks") == [1]
