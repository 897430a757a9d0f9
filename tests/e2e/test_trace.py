"""The trace and the torch profiles of a run with two ranks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from grpo_mega.cli import trace
from tests.helpers.finished_runs import ObservedRun
from tests.helpers.traces import check_trace


@pytest.fixture(scope="module")
def traced(two_ranks: ObservedRun) -> Path:
    """Return the folder of a run with a trace, whose second step has a profile."""
    return two_ranks.folder


def test_the_trace_has_phases_collectives_and_sampling_of_all_ranks(traced: Path) -> None:
    spans = [event for event in check_trace(traced / "trace.json.gz", num_ranks=2) if event["ph"] == "X"]
    for rank in range(2):
        own = [event for event in spans if event["pid"] == rank]
        phases = [event["name"] for event in own if event["cat"] == "phase"]
        for step in (1, 2):
            (whole,) = [event for event in own if event["name"] == f"step {step}"]
            end = whole["ts"] + whole["dur"]
            inside = {e["name"] for e in own if e["cat"] == "phase" and whole["ts"] <= e["ts"] < end}
            assert {"rollout", "reward", "log_probs", "train", "sync"} <= inside
        assert phases.count("start") == 1
        (first, second) = [event for event in own if event["cat"] == "engine" and event["name"] == "sample"][:2]
        assert first["args"]["rollouts"] > 0
        assert second["ts"] >= first["ts"] + first["dur"]
        assert {"allreduce", "wait allreduce"} <= {event["name"] for event in own if event["cat"] == "collective"}


def test_the_clocks_of_ranks_on_one_machine_agree(traced: Path) -> None:
    clocks = [
        event
        for path in sorted((traced / "trace").iterdir())
        for event in map(json.loads, path.read_text().splitlines())
        if event[0] == "clock"
    ]
    (_, _, first, exact), (_, _, second, uncertainty) = clocks
    assert exact == 0
    assert 0 < uncertainty < 1e9
    assert abs(first - second) <= uncertainty + 1


def test_each_rank_has_a_torch_profile_of_the_chosen_step_only(traced: Path) -> None:
    folders = sorted((traced / "profile").iterdir())
    assert [folder.name for folder in folders] == ["step_000002"]
    files = sorted(folders[0].iterdir())
    assert [file.name for file in files] == [f"rank-{rank:05d}.json.gz" for rank in range(2)]
    events = json.loads(gzip.decompress(files[1].read_bytes()))["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)


def test_the_command_makes_the_trace_of_a_killed_run(
    traced: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "again.json.gz"
    assert trace.main([str(traced), "--out", str(out)]) == 0
    assert "2 ranks on one clock" in capsys.readouterr().out
    assert gzip.decompress(out.read_bytes()) == gzip.decompress((traced / "trace.json.gz").read_bytes())
