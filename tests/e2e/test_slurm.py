"""Jobs on a real Slurm of two nodes: the four ways to start, requeue, the signal before the time limit, a failing rank.

The ranks are stubs (tests/helpers/stub_checkout.py); test_slurm_long.py runs the quickstart on this cluster.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo_mega.parallel.ports import free_port
from tests.helpers import slurm as slurm_helper
from tests.helpers.guides import shell_blocks
from tests.helpers.slurm import Slurm
from tests.helpers.stub_checkout import make_checkout, python_environment, ranks_of

QUICKSTART = "configs/quickstart.yaml"
ON_TWO_NODES = [
    {"RANK": r, "WORLD_SIZE": 4, "LOCAL_RANK": r % 2, "LOCAL_WORLD_SIZE": 2, "SLURM_NODEID": r // 2} for r in range(4)
]

GUIDE = shell_blocks("slurm.md")
(STOP_BLOCK,) = [block for block in GUIDE if block.startswith("scancel")]
(BY_HAND,) = [block for block in GUIDE if block.startswith("NNODES=")]

pytestmark = pytest.mark.skipif(bool(slurm_helper.reason_unavailable()), reason=slurm_helper.reason_unavailable())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    slurm_helper.install_slurm()
    with slurm_helper.running_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkout(tmp_path_factory.mktemp("stub") / "checkout")


@pytest.fixture
def job_arguments(tmp_path: Path) -> tuple[str, ...]:
    return QUICKSTART, f"run.dir={tmp_path / 'run'}"


def submit_job(cluster: Slurm, checkout: Path, *words: str, **env: str) -> str:
    """Run `sbatch --nodes=2 ... launch/slurm.sbatch` and return the job's number."""
    command = ("sbatch", "--nodes=2", f"--output={checkout}/job-%j.out", "launch/slurm.sbatch", *words)
    done = cluster.run(*command, cwd=checkout, env={**python_environment(), **env})
    assert done.returncode == 0, done.stderr
    return re.findall(r"\d+", done.stdout)[-1]


def read_job_output(checkout: Path, job: str) -> str:
    return (checkout / f"job-{job}.out").read_text()


def test_nodes_with_different_numbers_of_tasks_are_rejected_with_the_reason(
    cluster: Slurm, checkout: Path, job_arguments: tuple[str, ...]
) -> None:
    command = ("srun", "--nodes=2", "--ntasks=3", "launch/train.sh", *job_arguments)
    done = cluster.run(*command, cwd=checkout, env=python_environment())
    assert done.returncode == 2, done.stderr
    assert "2, 1 tasks on its nodes" in done.stderr


SLURMS_OWN = ("srun:", "slurmstepd-")  # slurmstepd prints a line when it signals the task of the other node


def test_a_failing_rank_ends_the_job_with_its_code_and_message(
    cluster: Slurm, checkout: Path, job_arguments: tuple[str, ...]
) -> None:
    """Rank 3 and the script are on different nodes; srun would return 143, the code of the agent that it ends."""
    job = submit_job(cluster, checkout, *job_arguments, "run.world_size=4", STUB_EXIT="3:2")
    shown = cluster.wait(job, "FAILED", timeout=180)
    assert shown["ExitCode"] == "2:0"
    assert shown["Restarts"] == "0"
    lines = [line for line in read_job_output(checkout, job).splitlines() if not line.startswith(SLURMS_OWN)]
    assert lines[-1] == "error: rank 3 fails"


def test_the_signal_before_the_time_limit_stops_the_ranks_and_requeues_the_job(
    cluster: Slurm, checkout: Path, tmp_path: Path, job_arguments: tuple[str, ...]
) -> None:
    """Slurm counts time limits in minutes, so the test sends the signal itself."""
    mark = tmp_path / "stopped"
    job = submit_job(cluster, checkout, *job_arguments, "run.world_size=4", STUB_WAIT=str(mark))
    cluster.wait(job, "RUNNING", timeout=180)
    slurm_helper.wait_until(lambda: len(list((tmp_path / "run").glob("rank_*.json"))) == 4, 180)
    ranks_of(tmp_path / "run")
    cluster.run_slurm_command(*shlex.split(STOP_BLOCK))
    slurm_helper.wait_until(mark.exists, 120)
    shown = cluster.wait(job, "COMPLETED", timeout=300)
    assert shown["Restarts"] == "1", read_job_output(checkout, job)
    assert "the job is requeued" in read_job_output(checkout, job)
    assert ranks_of(tmp_path / "run") == [{**rank, "SLURM_RESTART_COUNT": 1} for rank in ON_TWO_NODES]


def run_block(cluster: Slurm, checkout: Path, block: str, **env: str) -> str:
    """Run a block of the guide and wait for its jobs. Return the output."""
    done = cluster.run("bash", "-euo", "pipefail", "-c", block, cwd=checkout, env={**python_environment(), **env})
    assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
    slurm_helper.wait_until(lambda: cluster.run_slurm_command("squeue", "--noheader") == "", 180)
    return done.stdout


@pytest.mark.parametrize("command", [line for b in GUIDE if b not in (STOP_BLOCK, BY_HAND) for line in b.splitlines()])
def test_a_command_of_the_guide_starts_four_ranks_on_two_nodes(cluster: Slurm, checkout: Path, command: str) -> None:
    printed = run_block(cluster, checkout, command)
    if command.startswith("squeue"):
        assert "JOBID" in printed
    else:
        assert ranks_of(checkout / "runs" / "quickstart") == ON_TWO_NODES


def test_the_commands_of_the_guide_for_machines_without_slurm_start_four_ranks(cluster: Slurm, checkout: Path) -> None:
    """Run each line of the guide on this machine, which replaces host0; in the guide each is for a separate machine."""
    together = "".join(f"{line} &\nstarted+=($!)\n" for line in BY_HAND.replace("host0", "127.0.0.1").splitlines())
    each = (
        'for machine in "${started[@]}"; do wait "$machine"; done\n'  # also works for a machine that has exited already
    )
    run_block(cluster, checkout, together + each, MASTER_PORT=str(free_port()))
    places = [{key: rank[key] for key in rank if key != "SLURM_NODEID"} for rank in ON_TWO_NODES]
    assert ranks_of(checkout / "runs" / "quickstart") == places


def test_a_job_from_another_folder_fails_with_the_remedy(cluster: Slurm, checkout: Path, tmp_path: Path) -> None:
    script = str(checkout / "launch" / "slurm.sbatch")
    done = cluster.run("sbatch", "--wait", f"--output={tmp_path}/out", script, cwd=tmp_path)
    assert done.returncode == 2
    assert "GRPO_MEGA_ROOT" in (tmp_path / "out").read_text()
