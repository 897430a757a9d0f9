"""After SIGKILL, SIGTERM, Ctrl-C or SIGUSR1 the same command continues the run; the result equals the uninterrupted
run (the fixture `two_ranks`) exactly."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.engine_contract import sglang_here
from tests.helpers.finished_runs import TWO_RANKS as ARGUMENTS
from tests.helpers.finished_runs import TWO_RANKS_STEPS as STEPS
from tests.helpers.finished_runs import ObservedRun
from tests.helpers.jobs import (
    kill_when_complete,
    kill_with_children,
    read_json,
    read_lines,
    run_job_successfully,
    running_job,
    without_times,
)


def assert_same_run(run: Path, expected: Path) -> None:
    lines = [without_times(line) for line in read_lines(run / "metrics.jsonl")]
    assert lines == [without_times(line) for line in read_lines(expected / "metrics.jsonl")]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    parts = [f"step_{step:06d}/part-{part:05d}.parquet" for step in range(1, STEPS + 1) for part in (0, 1)]
    for folder in (run, expected):
        found = folder / "rollouts"
        assert sorted(str(path.relative_to(found)) for path in found.rglob("*") if path.is_file()) == parts
    for name in parts:
        assert (run / "rollouts" / name).read_bytes() == (expected / "rollouts" / name).read_bytes(), name
    ours, theirs = (read_json(folder / "summary.json") for folder in (run, expected))
    assert ours["status"] == theirs["status"] == "done"
    assert ours["policy_digest"] == theirs["policy_digest"]
    exported = Path("hf") / "model.safetensors"
    assert (run / exported).read_bytes() == (expected / exported).read_bytes()


def test_a_run_that_is_killed_then_stopped_by_sigterm_and_ctrl_c_equals_the_uninterrupted_run(
    two_ranks: ObservedRun, tmp_path: Path
) -> None:
    """The kill is in the second step; each signal arrives at the begin of a step, which it interrupts or ends."""
    run = tmp_path / "run"
    kill_when_complete(run, 1, tmp_path / "killed", ARGUMENTS)
    assert read_json(run / "summary.json")["status"] == "interrupted"
    stopped_at = len(list((run / "checkpoints").glob("step_*/complete")))
    assert 1 <= stopped_at <= STEPS - 3, "it was killed too late"
    leave_partial_files(run)
    arguments = [*ARGUMENTS, "checkpoint.every=100", f"run.dir={run}"]
    for starts, (number, code) in enumerate(((signal.SIGTERM, 143), (signal.SIGINT, 130)), start=2):
        output = tmp_path / f"until-{code}"
        with running_job(arguments, output) as process:
            wait_for_text(run / "logs" / "rank_00000.log", "training starts after step", starts, process)
            process.send_signal(number)
            assert process.wait(180) == code
        shown = output.with_suffix(".err").read_text()
        assert "Traceback" not in shown
        assert "the same command continues" in shown
        assert "Interrupted after" in shown
        before, stopped_at = stopped_at, read_json(run / "summary.json")["steps"]
        assert before <= stopped_at < STEPS
        assert (run / "checkpoints" / f"step_{stopped_at:06d}" / "complete").is_file()
        assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == list(range(1, stopped_at + 1))
    run_job_successfully(*arguments, output=tmp_path / "last")
    assert_same_run(run, two_ranks.folder)
    (discarded,) = (run / "discarded").iterdir()
    moved = discarded / "rollouts" / f"step_{STEPS:06d}"
    assert (moved / "part-00000.parquet").read_bytes() == b"PAR1 damaged"
    assert not (moved / "part-00001.parquet.tmp").exists()
    continued = without_times(read_lines(run / "metrics.jsonl")[-1])
    assert continued["train/grad_norm"] > 0  # the compared values are not all zero


def leave_partial_files(run: Path) -> None:
    """Write files that a kill in a later step may also leave."""
    step = run / "rollouts" / f"step_{STEPS:06d}"
    step.mkdir(exist_ok=True)
    (step / "part-00000.parquet").write_bytes(b"PAR1 damaged")
    (step / "part-00001.parquet.tmp").write_bytes(b"")
    (run / "checkpoints" / "step_000003.tmp").mkdir(exist_ok=True)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')


@pytest.mark.long
@pytest.mark.timeout(1600)  # three starts of an engine of four processes
@sglang_here
def test_a_killed_and_continued_run_with_sglang_equals_the_uninterrupted_run_and_leaves_no_process(
    tmp_path: Path,
) -> None:
    """One engine serves both ranks; its processes must exit although they are not children of the killed rank."""
    arguments = (*ARGUMENTS, "engine.kind=sglang", "engine.tp=2")
    expected, run = tmp_path / "expected", tmp_path / "run"
    run_job_successfully(*arguments, f"run.dir={expected}", output=tmp_path / "uninterrupted", timeout_seconds=500)
    kill_when_complete(run, 2, tmp_path / "first", arguments)
    run_job_successfully(*arguments, f"run.dir={run}", output=tmp_path / "second", timeout_seconds=500)
    assert_same_run(run, expected)


def wait_for_text(file: Path, text: str, times: int, process: psutil.Popen) -> None:
    """Wait until the file contains the text so many times."""
    deadline = time.monotonic() + 400
    while not file.exists() or file.read_text().count(text) < times:
        assert process.poll() is None, "the run ended"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.long
def test_a_run_stopped_after_its_step_and_continued_equals_the_uninterrupted_run(
    two_ranks: ObservedRun, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with running_job([*ARGUMENTS, "checkpoint.every=100", f"run.dir={run}"], tmp_path / "first") as process:
        deadline = time.monotonic() + 400
        while not (run / "config.yaml").exists():
            assert process.poll() is None, (tmp_path / "first.err").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)  # to the agent only, which forwards it
        code = process.wait(180)
    output = (tmp_path / "first.err").read_text()
    assert code == 130, output[-3000:]
    assert "stopped after step 1" in output
    assert read_json(run / "summary.json")["status"] == "interrupted"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000001"]
    run_job_successfully(*ARGUMENTS, f"run.dir={run}", output=tmp_path / "second")
    assert_same_run(run, two_ranks.folder)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
def test_a_run_killed_at_random_moments_until_it_finishes_equals_the_uninterrupted_run(
    two_ranks: ObservedRun, tmp_path: Path, seed: int
) -> None:
    """Kill and continue a run; each attempt gets more time than the one before, so that the run ends."""
    rng = random.Random(seed)
    run, limit = tmp_path / "run", 10.0
    kills = 0
    while True:
        with running_job([*ARGUMENTS, f"run.dir={run}"], tmp_path / f"attempt-{kills}") as process:
            try:
                code = process.wait(rng.uniform(limit / 2, limit))
            except psutil.TimeoutExpired:
                kill_with_children(process)
                kills, limit = kills + 1, limit * 1.25
                continue
            assert code == 0, (tmp_path / f"attempt-{kills}.err").read_text()[-3000:]
            break
    assert kills > 0
    assert_same_run(run, two_ranks.folder)
