"""launch/slurm.sbatch with stubs of Slurm's programs: what it runs after a failure, and when it requeues the job."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.jobs import REPOSITORY

SCRIPT = REPOSITORY / "launch" / "slurm.sbatch"
STARTED = "2026-11-22T09:30:00"
# Prints the times of a job and of each node as `scontrol --oneliner` does, with other times that look similar.
SCONTROL = """#!/bin/sh
FAR=2030-01-01T00:00:00
case "$*" in
    "--oneliner show job 7") echo "JobId=7 EligibleTime=2020-01-01T00:00:00 StartTime=$JOB EndTime=$FAR" ;;
    "--oneliner show node node[1-2]")
        for time in $NODES; do echo "NodeName=x BootTime=$FAR SlurmdStartTime=$time LastBusyTime=$FAR"; done ;;
    *) echo "scontrol $*" >> "$COMMANDS" ;;
esac
"""
SRUN = """#!/bin/sh
echo "srun $*" >> "$COMMANDS"
exit "$ANSWER"
"""


@dataclass(frozen=True)
class Cluster:
    """Stubs of Slurm's programs, first on the PATH. `commands` returns the commands that they received."""

    root: Path

    def exit_code_for(self, code: int, *, nodes: str = "", answer: int = 0, num_nodes: int = 2, starts: int = 0) -> int:
        """Return the script's exit code for a job whose ranks exit with `code`."""
        env = {
            "GRPO_MEGA_ROOT": str(self.root),
            "COMMANDS": str(self.root / "commands"),
            "CODE": str(code),
            "JOB": STARTED,
        }
        env |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": str(num_nodes)}
        env |= {"NODES": nodes, "ANSWER": str(answer), "SLURM_RESTART_COUNT": str(starts)}
        env["PATH"] = f"{self.root / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(["bash", SCRIPT], env=env, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode

    def commands(self) -> list[str]:
        path = self.root / "commands"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    programs = {"bin/scontrol": SCONTROL, "bin/srun": SRUN, "bin/sleep": "#!/bin/sh\n"}
    programs["launch/train.sh"] = '#!/bin/sh\nexit "$CODE"\n'
    for name, text in programs.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return Cluster(tmp_path)


BEFORE, LATER = "2026-11-21T23:00:00", "2026-11-22T09:30:31"
PROBE = "srun --overlap --nodes=2 --ntasks=2 --ntasks-per-node=1 true"
REQUEUE = "scontrol requeue 7"


@pytest.mark.parametrize(
    ("nodes", "requeued"),
    [
        (f"{BEFORE} {BEFORE}", False),
        (f"{BEFORE} {STARTED}", False),  # the job waited for this node
        (f"{BEFORE} {LATER}", True),
        (f"{LATER} {BEFORE}", True),
    ],
)
def test_a_failed_job_is_requeued_if_a_slurmd_is_younger_than_it(cluster: Cluster, nodes: str, requeued: bool) -> None:
    cluster.exit_code_for(1, nodes=nodes)
    assert cluster.commands() == [PROBE] + [REQUEUE] * requeued


def test_a_failed_job_on_nodes_that_stayed_keeps_its_exit_code(cluster: Cluster) -> None:
    assert cluster.exit_code_for(3, nodes=f"{BEFORE} {BEFORE}") == 3


def test_a_job_on_one_node_that_restarted_is_requeued_without_a_probe(cluster: Cluster) -> None:
    cluster.exit_code_for(1, nodes=LATER, num_nodes=1)
    assert cluster.commands() == [REQUEUE]


def test_a_job_whose_node_cannot_start_a_task_is_requeued(cluster: Cluster) -> None:
    cluster.exit_code_for(1, nodes=f"{BEFORE} {BEFORE}", answer=1)
    assert cluster.commands()[:2] == [PROBE, REQUEUE]


@pytest.mark.parametrize("code", [0, 2])
def test_a_job_that_is_done_or_has_wrong_input_runs_no_slurm_command(cluster: Cluster, code: int) -> None:
    assert cluster.exit_code_for(code, nodes=f"{LATER} {LATER}", answer=0) == code
    assert cluster.commands() == []


def test_a_requeued_job_uses_up_the_numbers_of_its_lost_steps(cluster: Cluster) -> None:
    assert cluster.exit_code_for(0, starts=2) == 0
    assert cluster.commands() == ["srun --nodes=2 --ntasks=2 --ntasks-per-node=1 true"] * 2
