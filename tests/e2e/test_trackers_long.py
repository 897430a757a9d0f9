"""Weights & Biases and MLflow, the real libraries without a network, show a run under the names of the metric table."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo_mega.observe.metric_table import require_known
from grpo_mega.observe.trackers.tracked_run import TrackedRun
from grpo_mega.observe.trackers.tracker import TrackerName, open_tracker
from tests.helpers.jobs import SMALL, read_lines, run_job_successfully

pytestmark = pytest.mark.long
POINTS = {1: {"reward/mean": 0.5, "set/a b:c/accuracy": 0.25}, 2: {"reward/mean": 0.75, "reward/p10": 0.0}}
CONFIG = {"optimizer": {"lr": 0.125}, "run": {"seed": 3}}


def needs(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install 'grpo_mega[{name}]'")


def write_two_commands(name: TrackerName, folder: Path) -> None:
    """Write step 1, end, and write step 2 in a second command of the same run."""
    for step, is_last in ((1, False), (2, True)):
        tracker = open_tracker(name, folder, CONFIG)
        tracker.write(step, POINTS[step])
        if is_last:
            tracker.finish()
        tracker.close()


def log_records(content: bytes) -> Iterator[bytes]:
    """Yield the records of a file in LevelDB's log format, after a header of 7 bytes.

    Blocks have 32 KiB. A part of a record has a checksum of 4 bytes, its length, and its place (whole, first, ...).
    """
    at, record = 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, place = struct.unpack_from("<HB", content, at + 4)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if place in (1, 4):
            yield record
            record = b""


def read_wandb(folder: Path, num_rows: int) -> list[dict[str, float]]:
    """Return the rows of all offline files of a run, in order, once there are `num_rows` or after 30 s.

    A process of the library writes them, and may do so after `finish` has returned.
    """
    end = time.monotonic() + 30.0
    while len(rows := read_offline_files(folder)) < num_rows and time.monotonic() < end:
        time.sleep(0.1)
    return rows


def read_offline_files(folder: Path) -> list[dict[str, float]]:
    """Return the rows that the offline files of a run hold now, in order."""
    from wandb.proto import wandb_internal_pb2

    rows: list[dict[str, float]] = []
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    for path in files:
        assert path.stem == f"run-{TrackedRun.of(folder, {}).identity}"
        for data in log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                items = record.history.item
                row = {("/".join(i.nested_key) if i.nested_key else i.key): json.loads(i.value_json) for i in items}
                rows.append({key: value for key, value in row.items() if not key.startswith("_")})
    return rows


def read_mlflow(folder: Path) -> tuple[list[tuple[str, int, float]], list[str], dict[str, str]]:
    """Return the points (name, step, value), the status of each run, and the parameters."""
    with sqlite3.connect(folder / "mlflow.db") as database:
        points = database.execute("select key, step, value from metrics order by step, key").fetchall()
        status = [row[0] for row in database.execute("select status from runs")]
        return points, status, dict(database.execute("select key, value from params").fetchall())


def test_wandb_has_every_point_of_both_commands_offline(tmp_path: Path) -> None:
    needs("wandb")
    write_two_commands("wandb", tmp_path)
    assert read_wandb(tmp_path, len(POINTS)) == [{"step": step, **metrics} for step, metrics in POINTS.items()]


def test_mlflow_has_one_run_with_every_point_of_both_commands(tmp_path: Path) -> None:
    needs("mlflow")
    write_two_commands("mlflow", tmp_path)
    points, status, parameters = read_mlflow(tmp_path)
    assert points == sorted(
        ((name, step, value) for step, metrics in POINTS.items() for name, value in metrics.items()),
        key=lambda point: (point[1], point[0]),
    )
    assert status == ["FINISHED"]
    assert parameters == {"optimizer.lr": "0.125", "run.seed": "3"}


def test_a_run_has_the_same_numbers_in_all_trackers(tmp_path: Path) -> None:
    needs("wandb")
    needs("mlflow")
    run = tmp_path / "run"
    keys = ("observe.trackers=[tensorboard,wandb,mlflow]", "train.steps=2", f"run.dir={run}")
    run_job_successfully(*SMALL, *keys, output=tmp_path / "log")
    lines = read_lines(run / "metrics.jsonl")
    rows, points = read_wandb(run, len(lines)), read_mlflow(run)[0]
    for line in lines:
        step = int(line["step"])
        expected: dict[str, Any] = {name: value for name, value in line.items() if "/" in name and value is not None}
        require_known(expected)
        (row,) = [row for row in rows if row["step"] == step]
        assert {name: row[name] for name in row if name != "step"} == pytest.approx(expected)
        assert {name: value for name, at, value in points if at == step} == pytest.approx(expected)


def test_a_server_that_does_not_answer_does_not_stop_a_run(tmp_path: Path) -> None:
    needs("mlflow")
    from tests.helpers.jobs import run_job

    run = tmp_path / "run"
    keys = ("observe.trackers=[mlflow]", "train.steps=2", f"run.dir={run}")
    environment = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    ended = run_job(*SMALL, *keys, output=tmp_path / "log", env=environment)
    assert ended.code == 0, ended.stderr[-2000:]
    assert len(read_lines(run / "metrics.jsonl")) == 2
    assert any("the tracker mlflow failed" in path.read_text() for path in (run / "logs").glob("rank_*.log"))
