"""The process beside a rank: it answers, or there is an error within the limit, with what it said last. No SGLang."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from grpo_mega.engines.sglang import engine_client as process_module
from grpo_mega.engines.sglang.engine_client import SglangProcess


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "_HOST", "tests.helpers.stub_engine_process")


def started(log: Path, fault: str = "none", timeout_seconds: float = 30.0) -> SglangProcess:
    process = SglangProcess({"fault": fault}, tp=2, log=log, timeout_seconds=timeout_seconds)
    for _ in process.started(10.0):
        pass
    return process


@pytest.fixture
def process(tmp_path: Path) -> Iterator[SglangProcess]:
    made = started(tmp_path / "log")
    yield made
    made.close()


def is_gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_its_environment_says_nothing_of_the_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    of_rank = {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "MASTER_PORT": "9",
        "TORCHELASTIC_USE_AGENT_STORE": "1",
        "SLURM_NTASKS": "4",
    }
    for key, value in {**of_rank, "SOMETHING": "else"}.items():
        monkeypatch.setenv(key, value)
    process = started(tmp_path / "log")
    request.addfinalizer(process.close)
    seen = process.call("environment")
    assert not of_rank.keys() & seen.keys()
    assert seen["SOMETHING"] == "else"
    assert seen["SGLANG_USE_CPU_ENGINE"] == "1"
    assert seen["SGLANG_CPU_OMP_THREADS_BIND"] == "0|0"


def test_a_refusal_is_an_error_with_its_words_and_the_next_call_is_answered(process: SglangProcess) -> None:
    with pytest.raises(
        RuntimeError, match=r"(?s)SGLang: ValueError: not like this; the end of .*log:.*settings arrived"
    ):
        process.call("refuse")
    assert process.call("child") > 0


def test_a_death_is_an_error_with_the_exit_code_and_the_end_of_the_log(process: SglangProcess) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)has ended with exit code 4 \(die\); the end of .*settings arrived"):
        process.call("die")
    with pytest.raises(RuntimeError, match="has ended with exit code 4"):
        process.call("child")


def test_a_start_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)has ended with exit code 3 \(start\).*settings arrived: start"):
        started(tmp_path / "log", "start")


def test_no_answer_within_the_limit_is_an_error_and_nothing_is_left(tmp_path: Path) -> None:
    process = started(tmp_path / "log", timeout_seconds=4.0)
    child = process.call("child")
    with pytest.raises(RuntimeError, match="SGLang did not answer stall within 4 s"):
        process.call("stall")
    assert is_gone(process.pid)
    assert is_gone(child)
    process.close()


def test_a_message_that_nobody_takes_is_an_error_within_the_limit(tmp_path: Path) -> None:
    process = started(tmp_path / "log", timeout_seconds=1.0)
    psutil.Process(process.pid).suspend()
    with pytest.raises(RuntimeError, match="SGLang did not take a message within 1 s"):
        process.call("child", bytes(64 * 2**20))
    assert is_gone(process.pid)
    process.close()


def test_a_stream_has_beats_where_nothing_comes_and_what_is_left_of_it_disturbs_nobody(process: SglangProcess) -> None:
    parts = list(process.stream("count", 3, 0.3, beat_seconds=0.1))
    assert [part for part in parts if part is not None] == [0, 1, 2]
    assert None in parts
    for part in process.stream("count", 3, 0.0, beat_seconds=5.0):
        assert part == 0
        break
    assert process.call("child") > 0


def test_closing_ends_it_and_its_children_and_may_be_repeated(process: SglangProcess) -> None:
    child = process.call("child")
    process.close()
    process.close()
    assert is_gone(process.pid)
    assert is_gone(child)
