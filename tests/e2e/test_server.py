"""A job with an engine server, started as a user does: its rollouts and accuracy, and the failure of job or server."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo_mega.parallel.ports import free_port
from tests.helpers.family_configs import raw_family_config
from tests.helpers.guides import shell_blocks
from tests.helpers.jobs import (
    QUICKSTART,
    REPOSITORY,
    SMALL,
    clean_environment,
    kill_with_children,
    read_json,
    read_lines,
    rollouts_of,
    run_job,
    run_job_successfully,
    running_job,
    wait_for_step,
    without_times,
)
from tests.helpers.servers import RunningServer, serving
from tests.helpers.tiny_models import make_family_model

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]
LIMIT = "guard.timeout_seconds=60"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Start a server for the quickstart, which serves one job after the other."""
    with serving([QUICKSTART, LIMIT], tmp_path_factory.mktemp("server") / "log", seconds=400.0) as found:
        yield found


def server_overrides(server: RunningServer) -> tuple[str, ...]:
    return "engine.placement=server", f"engine.urls=['{server.url}']", LIMIT


def test_a_server_samples_the_same_rollouts_as_a_colocated_engine(server: RunningServer, tmp_path: Path) -> None:
    synchronous = (*server_overrides(server), "train.max_staleness=0")
    for name, more in (("here", (LIMIT,)), ("there", server_overrides(server)), ("again", synchronous)):
        run_job_successfully(
            *SMALL, *more, "train.steps=3", f"run.dir={tmp_path / name}", output=tmp_path / f"{name}.log"
        )
    here, there, again = (read_json(tmp_path / name / "summary.json") for name in ("here", "there", "again"))
    assert here["policy_digest"] == there["policy_digest"] == again["policy_digest"]
    for step in (1, 2, 3):
        rows = rollouts_of(tmp_path / "here", step)
        assert rows == rollouts_of(tmp_path / "there", step) == rollouts_of(tmp_path / "again", step)
        assert len({tuple(row["completion_ids"]) for row in rows}) > 4


def test_two_ranks_share_a_server_and_an_environment_answers(tmp_path: Path) -> None:
    arguments = ("configs/calculator-tiny.yaml", "data.prompts_per_step=8", "data.eval=null", LIMIT)
    with serving(arguments, tmp_path / "server", seconds=600.0) as server:
        for name, more in (("here", ("engine.tp=1",)), ("there", server_overrides(server))):
            keys = ("train.steps=2", "checkpoint.export_hf=false", f"run.dir={tmp_path / name}")
            run_job_successfully(*arguments, *more, *keys, output=tmp_path / f"{name}.log", timeout_seconds=600)
        for step in (1, 2):
            assert rollouts_of(tmp_path / "here", step) == rollouts_of(tmp_path / "there", step)
        two = ("run.world_size=2", "parallel.tp=2", "train.steps=2", f"run.dir={tmp_path / 'two'}")
        run_job_successfully(
            *arguments, *server_overrides(server), *two, output=tmp_path / "two.log", timeout_seconds=600
        )
    rows = rollouts_of(tmp_path / "two", 1)
    assert [row["completion_ids"] for row in rows] == [
        row["completion_ids"] for row in rollouts_of(tmp_path / "here", 1)
    ]
    assert any(row["num_turns"] > 1 for row in rows)


def test_a_server_returns_the_same_expert_choices_as_a_colocated_engine(tmp_path: Path) -> None:
    raw = raw_family_config("qwen3_moe", num_hidden_layers=3, num_experts=32, num_experts_per_tok=4)
    model = make_family_model(tmp_path / "moe", raw, router_scale=0.05)
    arguments = (
        *SMALL,
        "model.base=null",
        f"model.path={model}",
        "precision.dtype=bf16",
        "sampling.max_tokens=16",
        "reward.terms=[{name: tests.helpers.plain_rewards:digits}]",
        "algorithm.routing_replay=true",
        "train.steps=2",
        LIMIT,
    )
    with serving(arguments, tmp_path / "server") as server:
        for name, more in (("here", ()), ("there", server_overrides(server))):
            run_job_successfully(*arguments, *more, f"run.dir={tmp_path / name}", output=tmp_path / f"{name}.log")
    here, there = (
        [without_times(line) for line in read_lines(tmp_path / n / "metrics.jsonl")] for n in ("here", "there")
    )
    different = {
        key for a, b in zip(here, there, strict=True) for key in a.keys() | b.keys() if a.get(key) != b.get(key)
    }
    assert different <= {"sync/bytes", "sync/received_bytes"}


def test_a_killed_job_releases_the_server_and_its_continued_run_equals_the_uninterrupted_run(
    server: RunningServer, tmp_path: Path
) -> None:
    keys = (*SMALL, *server_overrides(server), "train.steps=8", "checkpoint.every=2")
    run_job_successfully(*keys, f"run.dir={tmp_path / 'whole'}", output=tmp_path / "whole.log")
    with running_job([*keys, f"run.dir={tmp_path / 'cut'}"], tmp_path / "cut.log") as process:
        wait_for_step(tmp_path / "cut", 4)
        kill_with_children(process)
    run_job_successfully(*keys, f"run.dir={tmp_path / 'cut'}", output=tmp_path / "rest.log")
    whole, cut = (read_json(tmp_path / name / "summary.json") for name in ("whole", "cut"))
    assert whole["policy_digest"] == cut["policy_digest"]
    assert all(rollouts_of(tmp_path / "whole", n) == rollouts_of(tmp_path / "cut", n) for n in range(1, 9))


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_a_server_that_exits_or_is_stopped_ends_the_job_with_its_name(tmp_path: Path, signal_number: int) -> None:
    keys = (*SMALL, "guard.timeout_seconds=10", "train.steps=1000")
    with serving([*SMALL, LIMIT], tmp_path / "server") as server:
        run = tmp_path / "run"
        arguments = (*keys, "engine.placement=server", f"engine.urls=['{server.url}']", f"run.dir={run}")
        with running_job(arguments, tmp_path / "log") as process:
            wait_for_step(run, 2)
            server.process.send_signal(signal_number)
            began = time.monotonic()
            assert process.wait(120) == 1
            assert time.monotonic() - began < 60
        if signal_number == signal.SIGTERM:
            assert server.process.wait(10) == 0
    output = (tmp_path / "log.err").read_text()
    assert f"engine server engine.urls[0]={server.url}" in output
    assert read_json(run / "summary.json")["status"] == "failed"


def test_a_server_of_another_config_is_wrong_input(server: RunningServer, tmp_path: Path) -> None:
    ended = run_job(
        *SMALL,
        *server_overrides(server),
        "sampling.max_tokens=9",
        f"run.dir={tmp_path / 'run'}",
        output=tmp_path / "log",
    )
    assert ended.code == 2
    lines = ended.stderr.splitlines()
    assert lines[-1] == (
        f"error: engine.urls[0]={server.url}: that engine server has data.max_prompt_tokens + the largest max_tokens="
        "24, here 25; start it with this job's config"
    )


def test_the_commands_of_the_guide(tmp_path: Path) -> None:
    (text,) = shell_blocks("servers.md")
    short = f" train.steps=2 data.eval=null run.dir={tmp_path / 'run'} engine.placement=server"
    text = text.replace(" engine.placement=server", short).replace("7700", str(free_port()))
    with (tmp_path / "output").open("w") as output:
        script = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"{text}\nwait $!"],
            cwd=REPOSITORY,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            timeout=600,
            check=False,
        )
    assert script.returncode == 0, (tmp_path / "output").read_text()
    assert read_json(tmp_path / "run" / "summary.json")["status"] == "done"


def test_the_quickstart_learns_with_a_server(server: RunningServer, tmp_path: Path) -> None:
    run_job_successfully(
        QUICKSTART,
        *server_overrides(server),
        f"run.dir={tmp_path / 'run'}",
        output=tmp_path / "log",
        timeout_seconds=1200,
    )
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["eval_before"]["accuracy"] < 0.6
    assert summary["eval_after"]["accuracy"] > 0.9
