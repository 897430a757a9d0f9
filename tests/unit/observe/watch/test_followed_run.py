"""grpo_mega.observe.watch.followed_run: a folder that grows while it is read."""

from __future__ import annotations

import json
from pathlib import Path

from grpo_mega.observe.watch.followed_run import FollowedRun
from tests.helpers.reported_runs import metrics_line, write_run


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_an_empty_folder_becomes_a_run(tmp_path: Path) -> None:
    run = FollowedRun(tmp_path)
    assert not run.poll()
    assert run.history.steps == []
    (tmp_path / "config.yaml").write_text("train: {steps: 9}\n")
    append(tmp_path / "metrics.jsonl", json.dumps(metrics_line(1)) + "\n")
    assert run.poll()
    assert (run.history.steps, run.total_steps) == ([1], 9)
    assert not run.poll()


def test_a_line_is_read_when_it_is_whole_and_damaged_lines_are_counted(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    line = json.dumps(metrics_line(1) | {"wall_time": 77.0})
    append(metrics, line[:20])
    run = FollowedRun(tmp_path)
    assert not run.poll()
    append(metrics, line[20:] + '\n\xff{\n{"step": 1e400}\n')
    assert run.poll()
    assert (run.history.steps, run.num_damaged, run.last_written) == ([1], 2, 77.0)


def test_steps_that_are_made_again_replace_the_earlier_ones(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    append(metrics, "".join(json.dumps(metrics_line(s)) + "\n" for s in range(1, 9)))
    run = FollowedRun(tmp_path)
    run.poll()
    append(metrics, json.dumps(metrics_line(6) | {"reward/mean": 0.125}) + "\n")
    run.poll()
    assert run.history.steps == [1, 2, 3, 4, 5, 6]
    assert run.history.last("reward/mean") == 0.125
    metrics.write_text("".join(json.dumps(metrics_line(s)) + "\n" for s in range(1, 3)))
    run.poll()
    assert run.history.steps == [1, 2], "the file was replaced by a shorter one"


def test_rollouts_status_and_alarms_are_read_and_nothing_is_written(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=6)
    append(folder / "metrics.jsonl", "".join(json.dumps(metrics_line(s) | {"train/kl": 50}) + "\n" for s in (7, 8, 9)))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    run = FollowedRun(folder)
    run.poll()
    assert [row["reward"] for row in run.rollouts] == [1.0, 0.0]
    assert run.status == "done"
    assert [alarm.name for alarm in run.active_alarms] == ["far from the reference"]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
