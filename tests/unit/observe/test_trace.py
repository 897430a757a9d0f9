"""Rank files of a trace, and their merge into Chrome's format."""

from __future__ import annotations

import gzip
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from grpo_mega.cli import trace
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.observe.trace.merge import merge_trace
from grpo_mega.observe.trace.recorder import TraceRecorder
from grpo_mega.types import UserError
from tests.helpers.traces import check_trace, read_trace


def write_rank(folder: Path, rank: int, offset_ns: int, spans: list[tuple[str, int, int]], **settings: Any) -> None:
    recorder = TraceRecorder(folder / f"rank-{rank:05d}.jsonl", f"rank {rank}", **settings)
    recorder.set_clock(offset_ns, 1500)
    for name, start, end in spans:
        recorder.record(name, "phase", start, end, {"bytes": 3})
    recorder.close()


def test_all_ranks_are_on_one_clock(tmp_path: Path) -> None:
    write_rank(tmp_path, 0, 10_000, [("train", 5_000, 9_000)])
    write_rank(tmp_path, 1, -90_000, [("train", 106_000, 109_000)])  # a clock that is 100 us ahead
    merged = merge_trace(tmp_path, tmp_path / "trace.json.gz")
    assert (merged.num_ranks, merged.num_events, merged.num_skipped, merged.uncertainty_ns) == (2, 2, 0, 1500)
    spans = [event for event in check_trace(merged.path, num_ranks=2) if event["ph"] == "X"]
    assert [(event["pid"], event["ts"], event["dur"]) for event in spans] == [(0, 0.0, 4.0), (1, 1.0, 3.0)]
    assert spans[0]["args"] == {"bytes": 3}


def test_phases_are_nested_and_threads_are_apart(tmp_path: Path) -> None:
    recorder = TraceRecorder(tmp_path / "rank-00000.jsonl", "rank 0")
    recorder.set_clock(0, 0)
    timers = PhaseTimer(recorder=recorder)
    with timers.phase("rollout"), timers.phase("reward"):
        other = threading.Thread(target=lambda: recorder.record("write", "file", 1, 2, {}), name="background writer")
        other.start()
        other.join()
    recorder.counter("unfinished rollouts", 5, 7)
    recorder.close()
    events = check_trace(merge_trace(tmp_path, tmp_path / "out.gz").path, num_ranks=1)
    found = {event["name"]: event for event in events if event["ph"] == "X"}
    assert found["reward"]["ts"] >= found["rollout"]["ts"]
    assert found["write"]["tid"] != found["reward"]["tid"] == found["rollout"]["tid"]
    names = [event["args"]["name"] for event in events if event["name"] == "thread_name"]
    assert "background writer" in names
    assert [event["args"]["value"] for event in events if event["ph"] == "C"] == [7]


def test_a_killed_and_continued_rank_loses_one_line(tmp_path: Path) -> None:
    write_rank(tmp_path, 0, 0, [("train", 1_000, 2_000)])
    path = tmp_path / "rank-00000.jsonl"
    path.write_bytes(path.read_bytes() + b'["span", 1, "tr')
    write_rank(tmp_path, 0, 50_000, [("train", 1_000, 2_000)])
    merged = merge_trace(tmp_path, tmp_path / "out.gz")
    assert (merged.num_events, merged.num_skipped) == (2, 1)
    assert [event["ts"] for event in read_trace(merged.path) if event["ph"] == "X"] == [0.0, 50.0]


@pytest.mark.parametrize(
    "line",
    [b"\xff\xfe", b"{}", b"[]", b'["span", 1]', b'["clock", "r", "x", 0]', b'["counter", "a", 1, "</script>"]', b"3"],
)
def test_lines_that_are_no_events_are_counted(tmp_path: Path, line: bytes) -> None:
    write_rank(tmp_path, 0, 0, [("train", 1_000, 2_000)])
    with (tmp_path / "rank-00000.jsonl").open("ab") as file:
        file.write(line + b"\n")
    assert merge_trace(tmp_path, tmp_path / "out.gz").num_skipped == 1


def test_a_file_has_at_most_its_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spans = [("train", i, i + 1) for i in range(100)]
    recorder = TraceRecorder(tmp_path / "rank-00000.jsonl", "rank 0", max_bytes=2000)
    recorder.set_clock(0, 0)
    for name, start, end in spans:
        recorder.record(name, "phase", start, end, {})
        recorder.flush()
    assert recorder.is_full
    recorder.close()
    assert 2000 <= (tmp_path / "rank-00000.jsonl").stat().st_size < 2200
    assert "ends here" in caplog.text


def test_the_command_names_a_run_without_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trace.main([str(tmp_path)]) == 2
    assert "start the run with observe.trace=true" in capsys.readouterr().err
    (tmp_path / "trace").mkdir()
    write_rank(tmp_path / "trace", 0, 0, [("train", 1_000, 2_000)])
    assert trace.main([str(tmp_path)]) == 0
    assert "1 events of 1 ranks" in capsys.readouterr().out
    assert json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
    with pytest.raises(UserError, match="cannot be written"):
        merge_trace(tmp_path / "trace", tmp_path / "missing" / "out.gz")
