"""Wrong input on the command line gives exit code 2 and one message; failing rewards do not stop a run."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.helpers.bad_rewards import FLOOR, fails_for
from tests.helpers.finished_runs import Run
from tests.helpers.jobs import QUICKSTART, FinishedCommand, read_lines, rollouts_of, run_job


def assert_rejected(ended: FinishedCommand, *words: str) -> None:
    assert ended.code == 2, ended.stderr
    assert "Traceback" not in ended.stderr + ended.stdout
    messages = [line for line in ended.stderr.splitlines() if any(word in line for word in words)]
    assert len(messages) == 1, ended.stderr
    for word in words:
        assert word in messages[0]


def test_an_unknown_key_is_an_error_with_the_nearest_key(tmp_path: Path) -> None:
    ended = run_job(QUICKSTART, "train.stpes=3", f"run.dir={tmp_path / 'run'}", output=tmp_path / "log")
    assert_rejected(ended, "train.stpes", "train.steps")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_port_in_use_is_named_in_the_error(tmp_path: Path, world_size: int) -> None:
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen(1)
        port = str(server.getsockname()[1])
        arguments = (QUICKSTART, f"run.world_size={world_size}", f"run.dir={tmp_path / 'run'}")
        ended = run_job(*arguments, output=tmp_path / "log", env={"MASTER_PORT": port})
    assert_rejected(ended, f"MASTER_PORT={port}", "in use")
    assert not (tmp_path / "run").exists()


def test_the_error_of_a_run_folder_with_another_config_has_the_different_keys(quickstart: Run, tmp_path: Path) -> None:
    changed = ("data.overlong=skip", "optimizer.lr=0.5", "run.seed=9")
    ended = run_job(*quickstart.arguments, *changed, output=tmp_path / "log")
    assert_rejected(ended, "run.seed", "data.overlong", "checkpoint.resume=PATH", "run.overwrite=true")
    assert "train.steps" not in ended.stderr
    assert "optimizer.lr" not in ended.stderr


def test_rewards_that_crash_or_hang_score_their_floor_and_are_counted(four_ranks: Run) -> None:
    failed: dict[str | None, int] = {"crashes": 0, "sleeps": 0}
    for line in read_lines(four_ranks.folder / "metrics.jsonl"):
        rows = rollouts_of(four_ranks.folder, line["step"])
        for row in rows:
            name = fails_for(row["prompt"])
            assert row["reward_failures"] == ([] if name is None else [name])
            for term in ("crashes", "sleeps"):
                assert row["reward_components"][term] == (FLOOR if term == name else 1.0)
            if name is not None:
                failed[name] += 1
        fraction = sum(bool(row["reward_failures"]) for row in rows) / len(rows)
        assert line["reward/failed_fraction"] == pytest.approx(fraction)
    assert min(failed.values()) > 0, "the prompts of these two steps make neither fail: choose others"
