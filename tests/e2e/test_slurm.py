"""The four ways to start under a real Slurm of two nodes, its requeue and its signal; a rank that fails there.

Here the ranks are stand-ins (tests/helpers/stand_in.py); the quickstart on this cluster is in test_slurm_long.py.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import slurm as slurm_helper
from tests.helpers.slurm import Slurm
from tests.helpers.stand_in import environment, make_checkout, ranks_of

QUICKSTART = "configs/quickstart.yaml"
ON_TWO_NODES = [
    {"RANK": r, "WORLD_SIZE": 4, "LOCAL_RANK": r % 2, "LOCAL_WORLD_SIZE": 2, "SLURM_NODEID": r // 2} for r in range(4)
]

pytestmark = pytest.mark.skipif(bool(slurm_helper.why_not()), reason=slurm_helper.why_not())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    slurm_helper.install()
    with slurm_helper.slurm(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkout(tmp_path_factory.mktemp("stand_in") / "checkout")


@pytest.fixture
def arguments(tmp_path: Path) -> tuple[str, ...]:
    return QUICKSTART, f"run.dir={tmp_path / 'run'}"


def submitted(cluster: Slurm, checkout: Path, *words: str, **env: str) -> str:
    """The number of a job that `sbatch --nodes=2 ... launch/slurm.sbatch` has made."""
    command = ("sbatch", "--nodes=2", f"--output={checkout}/job-%j.out", "launch/slurm.sbatch", *words)
    done = cluster.run(*command, cwd=checkout, env={**environment(), **env})
    assert done.returncode == 0, done.stderr
    return re.findall(r"\d+", done.stdout)[-1]


def screen(checkout: Path, job: str) -> str:
    return (checkout / f"job-{job}.out").read_text()


def check(done: subprocess.CompletedProcess[str], tmp_path: Path) -> None:
    assert done.returncode == 0, done.stderr
    assert ranks_of(tmp_path / "run") == ON_TWO_NODES


def test_sbatch_starts_an_agent_on_each_node_and_its_ranks(
    cluster: Slurm, checkout: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    job = submitted(cluster, checkout, *arguments, "run.world_size=4")
    cluster.wait(job, "COMPLETED", timeout=60)
    assert ranks_of(tmp_path / "run") == ON_TWO_NODES, screen(checkout, job)


def test_train_in_an_allocation_calls_srun_itself(
    cluster: Slurm, checkout: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    command = ("salloc", "--nodes=2", "launch/train.sh", *arguments, "run.world_size=4")
    check(cluster.run(*command, cwd=checkout, env=environment()), tmp_path)


def test_srun_with_one_task_per_node_starts_agents(
    cluster: Slurm, checkout: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    command = ("srun", "--nodes=2", "--ntasks-per-node=1", "launch/train.sh", *arguments, "run.world_size=4")
    check(cluster.run(*command, cwd=checkout, env=environment()), tmp_path)


def test_srun_with_one_task_per_rank_starts_workers(
    cluster: Slurm, checkout: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    """The number of ranks is that of the step's tasks; the config says none."""
    command = ("srun", "--nodes=2", "--ntasks-per-node=2", "launch/train.sh", *arguments)
    check(cluster.run(*command, cwd=checkout, env=environment()), tmp_path)


def test_nodes_with_different_numbers_of_tasks_are_refused_with_the_reason(
    cluster: Slurm, checkout: Path, arguments: tuple[str, ...]
) -> None:
    command = ("srun", "--nodes=2", "--ntasks=3", "launch/train.sh", *arguments)
    done = cluster.run(*command, cwd=checkout, env=environment())
    assert done.returncode == 2, done.stderr
    assert "2, 1 tasks on its nodes: layouts need the same number of ranks on every node" in done.stderr


def test_a_failing_rank_ends_the_job_with_its_code_and_its_words(
    cluster: Slurm, checkout: Path, arguments: tuple[str, ...]
) -> None:
    """Rank 3 is on the other node than the script; srun would say 143, that of the agent it ends."""
    job = submitted(cluster, checkout, *arguments, "run.world_size=4", STAND_IN_EXIT="3:2")
    shown = cluster.wait(job, "FAILED", timeout=60)
    assert shown["ExitCode"] == "2:0"
    assert shown["Restarts"] == "0"
    said = [line for line in screen(checkout, job).splitlines() if not line.startswith("srun:")]
    assert said[-1] == "error: rank 3 says why"


def test_the_signal_before_the_time_limit_stops_the_ranks_and_requeues_the_job(
    cluster: Slurm, checkout: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    """Slurm counts time limits in minutes; the signal that it would send is sent by hand."""
    mark = tmp_path / "stopped"
    job = submitted(cluster, checkout, *arguments, "run.world_size=4", STAND_IN_WAIT=str(mark))
    cluster.wait(job, "RUNNING", timeout=60)
    slurm_helper.wait_until(lambda: len(list((tmp_path / "run").glob("rank_*.json"))) == 4, 60)
    ranks_of(tmp_path / "run")
    cluster.ask("scancel", "--batch", "--signal=USR1", job)
    slurm_helper.wait_until(mark.exists, 30)
    shown = cluster.wait(job, "COMPLETED", timeout=90)
    assert shown["Restarts"] == "1", screen(checkout, job)
    assert "the time limit is near; the job goes back into the queue" in screen(checkout, job)
    assert ranks_of(tmp_path / "run") == [{**rank, "SLURM_RESTART_COUNT": 1} for rank in ON_TWO_NODES]


def test_a_job_from_another_folder_is_told_where_to_submit_from(cluster: Slurm, checkout: Path, tmp_path: Path) -> None:
    script = str(checkout / "launch" / "slurm.sbatch")
    done = cluster.run("sbatch", "--wait", f"--output={tmp_path}/out", script, cwd=tmp_path)
    assert done.returncode == 2
    assert "submit from the checkout, or set GRPO_MEGA_ROOT to it" in (tmp_path / "out").read_text()
