"""Engine processes and servers that are killed or stopped: they are replaced, and the run equals the one without."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from grpo_mega.parallel.ports import free_port
from tests.helpers.engine_contract import sglang_here
from tests.helpers.jobs import (
    SMALL,
    read_json,
    read_lines,
    rollouts_of,
    run_job_successfully,
    running_job,
    without_times,
)
from tests.helpers.servers import serving
from tests.helpers.signals import act_in_phase, engine_process

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
STEPS = 5
KEYS = (*SMALL, f"train.steps={STEPS}", "guard.timeout_seconds=60", "checkpoint.export_hf=false")
SGLANG = (*KEYS, "engine.kind=sglang")


def assert_equal(run: Path, expected: Path) -> None:
    digests = [read_json(each / "summary.json")["policy_digest"] for each in (run, expected)]
    assert digests[0] == digests[1]
    ours, theirs = ([without_times(x) for x in read_lines(each / "metrics.jsonl")] for each in (run, expected))
    assert ours == theirs
    for step in range(1, STEPS + 1):
        assert rollouts_of(run, step) == rollouts_of(expected, step)


@pytest.fixture(scope="module")
def undisturbed_sglang(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sglang")
    run_job_successfully(*SGLANG, f"run.dir={root / 'run'}", output=root / "log")
    return root / "run"


@sglang_here
@pytest.mark.parametrize(
    ("victim", "number", "phase", "reason"),
    [
        pytest.param("engine_process", signal.SIGKILL, "rollout", "exited with code -9 during sample", id="kill"),
        pytest.param("sglang::scheduler", signal.SIGKILL, "rollout", "SGLang's process", id="kill the scheduler"),
        pytest.param("sglang::scheduler", signal.SIGSTOP, "rollout", "has been stopped (SIGSTOP", id="stop"),
        pytest.param("engine_process", signal.SIGKILL, "train", "exited with code -9", id="kill while it sleeps"),
        pytest.param("sglang::scheduler", signal.SIGSTOP, "train", "is stopped (SIGSTOP", id="stop while it sleeps"),
        pytest.param("engine_process", signal.SIGKILL, "sync", "the weight sync failed: ", id="kill in a sync"),
        pytest.param("sglang::scheduler", signal.SIGSTOP, "sync", "the weight sync failed: ", id="stop in a sync"),
    ],
)
def test_sglang_is_started_again_and_the_run_equals_the_undisturbed_one(
    undisturbed_sglang: Path, tmp_path: Path, victim: str, number: signal.Signals, phase: str, reason: str
) -> None:
    run = tmp_path / "run"
    with running_job((*SGLANG, f"run.dir={run}"), tmp_path / "log") as job:
        act_in_phase(job, phase, 2, lambda rank: engine_process(rank, victim).send_signal(number))
        assert job.wait(400) == 0, (tmp_path / "log.err").read_text()[-3000:]
    shown = (run / "logs" / "rank_00000.log").read_text()
    assert "the engines are rebuilt (1 of 2)" in shown
    assert reason in shown
    assert "(2 of 2)" not in shown
    assert_equal(run, undisturbed_sglang)


@pytest.fixture(scope="module")
def undisturbed_server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    with serving(KEYS, root / "server") as server:
        arguments = (*KEYS, "engine.placement=server", f"engine.urls=['{server.url}']")
        run_job_successfully(*arguments, f"run.dir={root / 'run'}", output=root / "log")
    return root / "run"


@pytest.mark.parametrize(
    ("phase", "reason"),
    [("rollout", "engine server engine.urls[0]={url} closed the connection"), ("sync", "the weight sync failed: ")],
)
def test_a_server_that_was_killed_and_started_again_at_its_address_continues_to_serve_the_run(
    undisturbed_server: Path, tmp_path: Path, phase: str, reason: str
) -> None:
    run, port = tmp_path / "run", free_port()
    with ExitStack() as stack:
        first = stack.enter_context(serving([*KEYS, f"--port={port}"], tmp_path / "server"))
        arguments = (*KEYS, "engine.placement=server", f"engine.urls=['127.0.0.1:{port}']", f"run.dir={run}")
        job = stack.enter_context(running_job(arguments, tmp_path / "log"))
        act_in_phase(job, phase, 3, lambda _: first.process.kill())
        first.process.wait(10)
        stack.enter_context(serving([*KEYS, f"--port={port}"], tmp_path / "again"))
        assert job.wait(300) == 0, (tmp_path / "log.err").read_text()[-3000:]
    shown = (run / "logs" / "rank_00000.log").read_text()
    assert reason.format(url=f"127.0.0.1:{port}") in shown
    assert "the engines are rebuilt (1 of 2)" in shown
    assert_equal(run, undisturbed_server)


@pytest.mark.parametrize(
    ("phase", "number"),
    [("rollout", signal.SIGKILL), ("rollout", signal.SIGSTOP), ("sync", signal.SIGKILL)],
)
def test_a_spare_server_takes_the_place_of_a_lost_one_and_the_run_equals_the_undisturbed_one(
    undisturbed_server: Path, tmp_path: Path, phase: str, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    with ExitStack() as stack:
        own, spare = (stack.enter_context(serving(KEYS, tmp_path / name)) for name in ("own", "spare"))
        urls = (f"engine.urls=['{own.url}']", f"engine.spare_urls=['{spare.url}']")
        arguments = (*KEYS, "engine.placement=server", *urls, f"run.dir={run}")
        job = stack.enter_context(running_job(arguments, tmp_path / "log"))
        act_in_phase(job, phase, 3, lambda _: own.process.send_signal(number))
        assert job.wait(400) == 0, (tmp_path / "log.err").read_text()[-3000:]
    shown = (run / "logs" / "rank_00000.log").read_text()
    assert f"engine.spare_urls[0]={spare.url} takes the place of engine.urls[0]={own.url}" in shown
    assert "the engines are rebuilt (1 of 2)" in shown
    assert_equal(run, undisturbed_server)


def test_a_server_that_is_stopped_for_a_while_is_named_and_serves_the_run_afterwards(
    undisturbed_server: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with serving(KEYS, tmp_path / "server") as server:
        arguments = (*KEYS, "engine.placement=server", f"engine.urls=['{server.url}']", f"run.dir={run}")
        with running_job(arguments, tmp_path / "log") as job:
            act_in_phase(job, "rollout", 3, lambda _: server.process.suspend())
            shown = run / "logs" / "rank_00000.log"
            deadline = time.monotonic() + 100
            while "the engines are rebuilt (1 of 2)" not in shown.read_text():
                assert time.monotonic() < deadline
                assert job.poll() is None
                time.sleep(0.2)
            server.process.resume()
            assert job.wait(300) == 0, (tmp_path / "log.err").read_text()[-3000:]
    assert f"engine server engine.urls[0]={server.url} is not responding: no message for 45 s" in shown.read_text()
    assert_equal(run, undisturbed_server)


def test_a_server_that_stays_away_ends_the_run_with_its_name(tmp_path: Path) -> None:
    with serving(KEYS, tmp_path / "server") as server:
        arguments = (*KEYS, "engine.placement=server", f"engine.urls=['{server.url}']", "guard.timeout_seconds=10")
        with running_job((*arguments, f"run.dir={tmp_path / 'run'}"), tmp_path / "log") as job:
            act_in_phase(job, "rollout", 3, lambda _: server.process.kill())
            assert job.wait(60) == 1
    message = (tmp_path / "log.err").read_text()
    assert "the engines cannot be rebuilt: " in message
    assert f"engine.urls[0]={server.url}: no engine server was available" in message
