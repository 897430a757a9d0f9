"""launch/slurm.sbatch without Slurm: what it asks Slurm when a job has ended, and when it puts the job back."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.jobs import REPOSITORY

SCRIPT = REPOSITORY / "launch" / "slurm.sbatch"
STARTED = "2026-11-22T09:30:00"
# As `scontrol --oneliner` prints them: the times of a job and of each node, among others that look alike.
SCONTROL = """#!/bin/sh
FAR=2030-01-01T00:00:00
case "$*" in
    "--oneliner show job 7") echo "JobId=7 EligibleTime=2020-01-01T00:00:00 StartTime=$JOB EndTime=$FAR" ;;
    "--oneliner show node node[1-2]")
        for time in $NODES; do echo "NodeName=x BootTime=$FAR SlurmdStartTime=$time LastBusyTime=$FAR"; done ;;
    *) echo "scontrol $*" >> "$SAID" ;;
esac
"""
SRUN = """#!/bin/sh
echo "srun $*" >> "$SAID"
exit "$ANSWER"
"""


@dataclass(frozen=True)
class Cluster:
    """Programs with Slurm's names, which come first on the PATH; `said` holds what was asked of them."""

    root: Path

    def ended(self, code: int, *, nodes: str = "", answer: int = 0, num_nodes: int = 2, starts: int = 0) -> int:
        """The script's exit code for a job whose ranks end with `code`."""
        env = {"GRPO_MEGA_ROOT": str(self.root), "SAID": str(self.root / "said"), "CODE": str(code), "JOB": STARTED}
        env |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": str(num_nodes)}
        env |= {"NODES": nodes, "ANSWER": str(answer), "SLURM_RESTART_COUNT": str(starts)}
        env["PATH"] = f"{self.root / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(["bash", SCRIPT], env=env, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode

    def said(self) -> list[str]:
        path = self.root / "said"
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
BACK = "scontrol requeue 7"


@pytest.mark.parametrize(
    ("nodes", "back"),
    [
        (f"{BEFORE} {BEFORE}", False),
        (f"{BEFORE} {STARTED}", False),  # the job was waiting for it
        (f"{BEFORE} {LATER}", True),
        (f"{LATER} {BEFORE}", True),
    ],
)
def test_a_job_that_failed_is_put_back_if_a_slurmd_is_younger_than_it(cluster: Cluster, nodes: str, back: bool) -> None:
    cluster.ended(1, nodes=nodes)
    assert cluster.said() == [PROBE] + [BACK] * back


def test_a_job_that_failed_on_nodes_that_stayed_ends_with_its_own_code(cluster: Cluster) -> None:
    assert cluster.ended(3, nodes=f"{BEFORE} {BEFORE}") == 3


def test_a_job_on_one_node_that_was_away_is_put_back_without_a_probe(cluster: Cluster) -> None:
    cluster.ended(1, nodes=LATER, num_nodes=1)
    assert cluster.said() == [BACK]


def test_a_job_whose_node_starts_no_task_is_put_back(cluster: Cluster) -> None:
    cluster.ended(1, nodes=f"{BEFORE} {BEFORE}", answer=1)
    assert cluster.said()[:2] == [PROBE, BACK]


@pytest.mark.parametrize("code", [0, 2])
def test_a_job_that_is_done_or_was_given_wrong_input_asks_slurm_nothing(cluster: Cluster, code: int) -> None:
    assert cluster.ended(code, nodes=f"{LATER} {LATER}", answer=0) == code
    assert cluster.said() == []


def test_a_job_that_was_put_back_leaves_the_numbers_of_its_lost_steps_behind(cluster: Cluster) -> None:
    assert cluster.ended(0, starts=2) == 0
    assert cluster.said() == ["srun --nodes=2 --ntasks=2 --ntasks-per-node=1 true"] * 2
