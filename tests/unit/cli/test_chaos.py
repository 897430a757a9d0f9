"""grpo-mega chaos: its cases, its comparison of runs, its wrong input. tests/e2e/test_chaos.py disturbs real runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import pytest

from grpo_mega.cli import chaos
from grpo_mega.cli.chaos_cases import SCENARIOS, SIGNALS, draw_cases
from grpo_mega.cli.chaos_run import ChaosOutcome, ChaosRuns, differences


def test_a_seed_determines_the_cases_and_sixty_hold_every_victim_of_every_scenario_and_every_signal() -> None:
    cases = draw_cases(60, 0)
    assert cases == draw_cases(60, 0)
    assert cases != draw_cases(60, 1)
    assert {(case.scenario.name, case.victim) for case in cases} == {
        (scenario.name, victim) for scenario in SCENARIOS for victim in scenario.victims
    }
    assert {case.signal for case in cases} == set(SIGNALS)
    assert {case.victim for case in cases} == {"rank", "launcher", "engine process", "reward worker", "server"}
    assert all(0 <= case.moment < 1 and case.number < case.scenario.world_size for case in cases)
    assert len({(case.scenario.name, case.victim, case.signal) for case in cases}) > 50  # few of them twice


def complete_run(folder: Path, **changed: Any) -> Path:
    (folder / "rollouts" / "step_000001").mkdir(parents=True)
    (folder / "rollouts" / "step_000001" / "part-0").write_text(changed.get("rollout", "tokens"))
    summary = {"status": "done", "steps": 2, "policy_digest": changed.get("digest", "abc"), "seconds": {"total": 3}}
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = [
        {"step": step, "train/loss": changed.get("loss", 0.5), "time/step_seconds": changed.get("seconds", 1.0)}
        for step in range(1, changed.get("steps", 2) + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"seconds": 9.0}, ""),
        ({"digest": "xyz"}, "summary.json: policy_digest=xyz, expected abc"),
        ({"loss": 0.25}, "step 1: train/loss=0.25, expected 0.5"),
        ({"steps": 1}, "metrics.jsonl: steps [1]"),
        ({"rollout": "other"}, "rollouts: rollouts/step_000001/part-0 differs"),
    ],
)
def test_state_metrics_and_rollouts_are_compared_but_not_times(
    tmp_path: Path, changed: dict[str, Any], expected: str
) -> None:
    found = differences(complete_run(tmp_path / "a", **changed), complete_run(tmp_path / "b"))
    assert found[:1] == ([expected] if expected else [])


def test_an_incomplete_run_is_a_difference(tmp_path: Path) -> None:
    expected = complete_run(tmp_path / "b")
    assert differences(tmp_path / "missing", expected)[0].startswith("the run is not complete")
    shutil.copytree(expected, tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "rollouts")
    assert differences(tmp_path / "a", expected) == ["rollouts: rollouts/step_000001/part-0 differs"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "PP9"], "--only=PP9 is in no name of a scenario; use a part of one of these: DP2 vLLM, TP2 vLLM"),
        (["--number", "0"], "--number=0 must be at least 1"),
        (["--work", "."], "--work=. exists; name a new folder"),
    ],
)
def test_wrong_input_is_named(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert chaos.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_difference_is_shown_in_the_table_and_gives_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = iter([(), ("start 1 left /dev/shm/psm_1",)])
    monkeypatch.setattr(ChaosRuns, "run", lambda _, case: ChaosOutcome(case, 2, True, 3.0, next(problems)))
    assert chaos.main(["--number", "2", "--only", "TP2 vLLM", "--work", str(tmp_path / "work"), "--json"]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].endswith("equal, nothing left")
    assert shown[2].endswith("start 1 left /dev/shm/psm_1")
    assert shown[3] == "1 of 2 ended as the undisturbed run and left nothing behind"
    result = json.loads(shown[-1])
    assert (result["number"], result["equal"], result["disturbed"]) == (2, 1, 2)


def test_a_process_a_segment_or_a_file_that_a_run_leaves_is_found(tmp_path: Path) -> None:
    runs = ChaosRuns("quickstart", tmp_path, 10.0)
    before = set(os.listdir("/dev/shm"))
    assert [each for each in runs._leftovers(before) if str(tmp_path) in each] == []
    (tmp_path / "t" / "left").touch()
    env = {**os.environ, "TMPDIR": str(tmp_path / "t" / "grpo_mega_run_x")}
    segment = SharedMemory(create=True, size=16)
    name, path = segment.name, Path("/dev/shm") / segment.name
    segment.close()
    with subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], env=env) as process:
        found = "\n".join(runs._leftovers(before))
        process.send_signal(signal.SIGKILL)
    path.unlink()
    assert f"process {process.pid} (" in found
    assert f"/dev/shm/{name}" in found
    assert str(tmp_path / "t" / "left") in found
