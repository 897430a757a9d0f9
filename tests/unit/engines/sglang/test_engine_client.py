"""The client of SGLang's process, with a stub in place of SGLang: answers, timeouts, and errors with the log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from grpo_mega.engines.sglang import engine_client
from grpo_mega.engines.sglang.engine_client import SglangProcess
from tests.helpers.signals import stop_process


@pytest.fixture(autouse=True)
def stub_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "_HOST_MODULE", "tests.helpers.stub_engine_process")


def start(log: Path, fault: str = "none", timeout_seconds: float = 30.0) -> SglangProcess:
    process = SglangProcess({"fault": fault}, tp=2, log=log, timeout_seconds=timeout_seconds)
    for _ in process.started(10.0):
        pass
    return process


@pytest.fixture
def process(tmp_path: Path) -> Iterator[SglangProcess]:
    client = start(tmp_path / "log")
    yield client
    client.close()


def is_gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_the_environment_of_the_process_has_no_variables_of_the_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    rank_variables = {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "MASTER_PORT": "9",
        "TORCHELASTIC_USE_AGENT_STORE": "1",
        "SLURM_NTASKS": "4",
    }
    for key, value in {**rank_variables, "SOMETHING": "else"}.items():
        monkeypatch.setenv(key, value)
    process = start(tmp_path / "log")
    request.addfinalizer(process.close)
    seen = process.call("environment")
    assert not rank_variables.keys() & seen.keys()
    assert seen["SOMETHING"] == "else"
    assert seen["SGLANG_USE_CPU_ENGINE"] == "1"
    assert seen["SGLANG_CPU_OMP_THREADS_BIND"] == "0|0"


def test_a_failed_command_is_an_error_with_its_message_and_the_next_call_is_answered(process: SglangProcess) -> None:
    with pytest.raises(
        RuntimeError, match=r"(?s)SGLang: ValueError: wrong argument; the end of .*log:.*settings arrived"
    ):
        process.call("fail")
    assert process.call("child") > 0


def test_an_exit_is_an_error_with_the_exit_code_and_the_end_of_the_log(process: SglangProcess) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)exited with code 4 during die; the end of .*settings arrived"):
        process.call("die")
    with pytest.raises(RuntimeError, match="exited with code 4"):
        process.call("child")


def test_a_start_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)exited with code 3 during start.*settings arrived: start"):
        start(tmp_path / "log", "start")


def test_no_answer_within_the_timeout_is_an_error_and_all_processes_end(tmp_path: Path) -> None:
    process = start(tmp_path / "log", timeout_seconds=4.0)
    child = process.call("child")
    with pytest.raises(RuntimeError, match="SGLang did not answer stall within 4 s"):
        process.call("stall")
    assert is_gone(process.pid)
    assert is_gone(child)
    process.close()


def test_a_message_that_is_not_read_is_an_error_within_the_timeout(tmp_path: Path) -> None:
    process = start(tmp_path / "log", timeout_seconds=1.0)
    psutil.Process(process.pid).suspend()
    with pytest.raises(RuntimeError, match="SGLang did not accept a message within 1 s"):
        process.call("child", bytes(64 * 2**20))
    assert is_gone(process.pid)
    process.close()


def test_a_stream_yields_heartbeats_between_results_and_its_unread_rest_is_skipped(process: SglangProcess) -> None:
    parts = list(process.stream("count", 3, 0.3, beat_seconds=0.1))
    assert [part for part in parts if part is not None] == [0, 1, 2]
    assert None in parts
    for part in process.stream("count", 3, 0.0, beat_seconds=5.0):
        assert part == 0
        break
    assert process.call("child") > 0


def test_close_ends_the_process_and_its_children_and_may_be_repeated(process: SglangProcess) -> None:
    child = process.call("child")
    process.close()
    process.close()
    assert is_gone(process.pid)
    assert is_gone(child)


@pytest.mark.parametrize("is_call", [False, True])
@pytest.mark.parametrize("is_child", [False, True])
def test_a_process_of_sglang_that_stays_stopped_during_a_command_is_killed_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_child: bool, is_call: bool
) -> None:
    monkeypatch.setattr(engine_client, "_STOPPED_SECONDS", 0.5)
    monkeypatch.setattr(engine_client, "_CHECK_SECONDS", 0.1)
    process = start(tmp_path / "log")
    assert process.fault() == ""
    stopped = process.call("child") if is_child else process.pid
    stream = process.stream("stall", beat_seconds=0.1)
    if not is_call:
        assert next(stream) is None
    psutil.Process(stopped).suspend()
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=rf"SGLang's process {stopped} has been stopped .* for 0.5 s during stall"):
        process.call("stall") if is_call else list(stream)
    assert 0.4 < time.monotonic() - begin < 10
    assert is_gone(process.pid)
    process.close()


@pytest.mark.parametrize("is_call", [False, True])
def test_a_process_that_sglang_started_and_that_exits_is_named_and_the_others_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_call: bool
) -> None:
    monkeypatch.setattr(engine_client, "_CHECK_SECONDS", 0.1)
    process = start(tmp_path / "log")
    child = process.call("child")
    assert process.fault() == ""
    psutil.Process(child).kill()
    assert is_gone(child)
    assert process.fault().startswith(f"SGLang's process {child} exited; the end of ")
    with pytest.raises(RuntimeError, match=rf"SGLang's process {child} exited during stall; the end of "):
        process.call("stall") if is_call else list(process.stream("stall", beat_seconds=600.0))
    assert is_gone(process.pid)
    process.close()


def test_a_lost_process_is_a_fault(tmp_path: Path) -> None:
    process = start(tmp_path / "log")
    stop_process(process.pid)
    assert process.fault() == f"SGLang's process {process.pid} is stopped (SIGSTOP, or a debugger)"
    psutil.Process(process.pid).kill()
    assert is_gone(process.pid)
    assert process.fault().startswith(f"SGLang's process {process.pid} exited with code -9")
    process.close()
