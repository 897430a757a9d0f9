"""Several machines without Slurm: agents start in any order, a wrong address is named, and one failure ends all.

Both agents run on this machine. In the short tier the ranks are stubs (tests/helpers/stub_checkout.py); in the long
tier they train, started by `launch/train.sh` and by torchrun.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from grpo_mega.parallel.ports import free_port
from tests.helpers.jobs import REPOSITORY, SMALL, clean_environment, kill_with_children, read_json
from tests.helpers.stub_checkout import make_checkout, python_environment, ranks_of

QUICKSTART = "configs/quickstart.yaml"
APART_SECONDS = 60


@dataclass(frozen=True)
class Agent:
    """The running command of one machine, and the file with its output."""

    process: psutil.Popen
    screen: Path

    def code(self, timeout: float) -> int:
        return int(self.process.wait(timeout))


@contextmanager
def running_agents(
    commands: Sequence[Sequence[str]], folder: Path, screens: Path, envs: Sequence[Mapping[str, str]], apart: float
) -> Iterator[list[Agent]]:
    """Start one command per machine, `apart` seconds after each other; end all on exit."""
    started: list[Agent] = []
    try:
        for i, (command, env) in enumerate(zip(commands, envs, strict=True)):
            if i:
                time.sleep(apart)
            screen = screens / f"machine-{i}"
            with screen.open("wb") as stream:
                process = psutil.Popen(
                    list(command),
                    cwd=folder,
                    env={**clean_environment(), **python_environment(), **env},
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    start_new_session=True,
                )
            started.append(Agent(process, screen))
        yield started
    finally:
        for agent in started:
            kill_with_children(agent.process)


def machine_environments(num_nodes: int, **env: str) -> list[dict[str, str]]:
    port = str(free_port())
    return [
        {"NNODES": str(num_nodes), "NODE_RANK": str(i), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **env}
        for i in range(num_nodes)
    ]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkout(tmp_path_factory.mktemp("stub") / "checkout")


@pytest.mark.parametrize("first", [0, 1])
def test_machines_that_start_apart_join_in_either_order(checkout: Path, tmp_path: Path, first: int) -> None:
    command = ("launch/train.sh", QUICKSTART, "run.world_size=4", f"run.dir={tmp_path / 'run'}")
    envs = machine_environments(2)
    ordered = [envs[first], envs[1 - first]]
    with running_agents([command] * 2, checkout, tmp_path, ordered, apart=2) as both:
        for agent in both:
            assert agent.code(180) == 0, agent.screen.read_text()
    ranks = ranks_of(tmp_path / "run")
    assert [(r["RANK"], r["LOCAL_RANK"], r["LOCAL_WORLD_SIZE"]) for r in ranks] == [(i, i % 2, 2) for i in range(4)]


def test_a_wrong_master_addr_ends_with_a_message_that_names_it(checkout: Path, tmp_path: Path) -> None:
    command = ("launch/train.sh", QUICKSTART, "run.world_size=4", "guard.timeout_seconds=3", f"run.dir={tmp_path}/run")
    envs = [{**machine_environments(2)[1], "MASTER_ADDR": "no-such-machine.invalid"}]
    with running_agents([command], checkout, tmp_path, envs, apart=0) as (alone,):
        assert alone.code(180) == 2
    (line,) = alone.screen.read_text().splitlines()
    assert line.startswith("error: MASTER_ADDR=no-such-machine.invalid, port ")
    assert "within 3 s" in line


def test_machines_with_different_numbers_of_ranks_are_rejected_on_both(checkout: Path, tmp_path: Path) -> None:
    commands = [("launch/train.sh", QUICKSTART, f"run.world_size={size}", f"run.dir={tmp_path}/run") for size in (2, 4)]
    with running_agents(commands, checkout, tmp_path, machine_environments(2), apart=0) as both:
        for agent in both:
            assert agent.code(180) == 2
            assert "the same number" in agent.screen.read_text()


def test_a_failing_rank_ends_the_other_machine_with_its_code_and_message(checkout: Path, tmp_path: Path) -> None:
    command = ("launch/train.sh", QUICKSTART, "run.world_size=4", f"run.dir={tmp_path / 'run'}")
    with running_agents([command] * 2, checkout, tmp_path, machine_environments(2, STUB_EXIT="3:2"), apart=0) as both:
        for agent in both:
            assert agent.code(180) == 2
            assert agent.screen.read_text().splitlines()[-1] == "error: rank 3 fails"
    assert "rank 3 on " in both[0].screen.read_text()


TRAIN = (*SMALL, "parallel.tp=2", "train.steps=1")


@pytest.mark.long
def test_two_agents_started_a_minute_apart_train_together(tmp_path: Path) -> None:
    command = ("launch/train.sh", *TRAIN, "run.world_size=4", f"run.dir={tmp_path / 'run'}")
    with running_agents([command] * 2, REPOSITORY, tmp_path, machine_environments(2), apart=APART_SECONDS) as both:
        for agent in both:
            assert agent.code(400) == 0, agent.screen.read_text()
    assert read_json(tmp_path / "run" / "summary.json")["status"] == "done"


@pytest.mark.long
def test_two_torchrun_agents_started_a_minute_apart_train_together(tmp_path: Path) -> None:
    port = str(free_port())
    commands = [
        (
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", f"--node-rank={i}"),
            *("--master-addr=127.0.0.1", f"--master-port={port}", "-m", "grpo_mega.train", *TRAIN),
            f"run.dir={tmp_path / 'run'}",
        )
        for i in (1, 0)
    ]
    envs = [{"PYTHONPATH": str(REPOSITORY)}] * 2
    with running_agents(commands, REPOSITORY, tmp_path, envs, apart=APART_SECONDS) as both:
        for agent in both:
            assert agent.code(400) == 0, agent.screen.read_text()[-5000:]
    assert read_json(tmp_path / "run" / "summary.json")["layout"]["world_size"] == 4


@pytest.mark.long
def test_ranks_without_agents_name_a_wrong_master_addr(tmp_path: Path) -> None:
    """Start the ranks as srun does with one task per rank."""
    command = (sys.executable, "-m", "grpo_mega.train", *TRAIN, "guard.timeout_seconds=5", f"run.dir={tmp_path}/run")
    env = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29871"}
    with running_agents([command], REPOSITORY, tmp_path, [{**env, "PYTHONPATH": str(REPOSITORY)}], apart=0) as (alone,):
        assert alone.code(120) == 2
    (error,) = [line for line in alone.screen.read_text().splitlines() if line.startswith("error: ")]
    assert "MASTER_ADDR=127.0.0.1, MASTER_PORT=29871" in error
    assert "within 5 s" in error
