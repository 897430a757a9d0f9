"""The quickstart on a real Slurm: each way to start it, and a node that is lost and restarts."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import slurm as slurm_helper
from tests.helpers.jobs import REPOSITORY, SMALL, read_json, read_lines
from tests.helpers.slurm import Slurm, wait_until
from tests.helpers.stub_checkout import make_checkout, python_environment, ranks_of

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(slurm_helper.reason_unavailable()), reason=slurm_helper.reason_unavailable()),
]
STEPS = 8
BACK_AFTER_SECONDS = 30


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    slurm_helper.install_slurm()
    # A job must not start at the moment at which its node restarts: by default Slurm waits two minutes.
    with slurm_helper.running_cluster(tmp_path_factory.mktemp("slurm") / "cluster", requeue_seconds=60) as running:
        yield running


@pytest.mark.parametrize(
    ("starter", "ranks"),
    [
        (("salloc", "--nodes=2"), "run.world_size=4"),
        (("srun", "--nodes=2", "--ntasks-per-node=1"), "run.world_size=4"),
        (("srun", "--nodes=2", "--ntasks-per-node=2"), "run.world_size=4"),
        (("sbatch", "--wait", "--nodes=2", "launch/slurm.sbatch"), "run.world_size=4"),
    ],
    ids=["salloc", "srun-agents", "srun-workers", "sbatch"],
)
def test_a_step_of_the_quickstart_on_two_nodes(
    cluster: Slurm, tmp_path: Path, starter: tuple[str, ...], ranks: str
) -> None:
    script = () if "launch/slurm.sbatch" in starter else ("launch/train.sh",)
    if not script:
        starter = (starter[0], f"--output={tmp_path}/screen", *starter[1:])
    arguments = (*SMALL, ranks, "parallel.tp=2", "train.steps=1", f"run.dir={tmp_path / 'run'}")
    done = cluster.run(*starter, *script, *arguments, cwd=REPOSITORY, timeout=400, env=python_environment())
    assert done.returncode == 0, done.stdout + done.stderr
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["status"] == "done"
    assert (summary["layout"]["world_size"], summary["layout"]["tp"], summary["layout"]["dp"]) == (4, 2, 2)
    logs = sorted(path.name for path in (tmp_path / "run" / "logs").iterdir())
    assert logs == [f"rank_{rank:05d}.log" for rank in range(4)]


@pytest.mark.parametrize(
    ("lost", "seconds"),
    # node1 also runs the batch script; after two seconds Slurm has not missed the node, and srun waits for its task
    [("node2", BACK_AFTER_SECONDS), ("node1", BACK_AFTER_SECONDS), ("node2", 2)],
)
def test_a_job_whose_node_is_lost_starts_again_on_both_nodes_after_its_restart(
    cluster: Slurm, tmp_path: Path, lost: str, seconds: float
) -> None:
    """The ranks are stubs that only wait (tests/helpers/stub_checkout.py)."""
    checkout, mark, screen = make_checkout(tmp_path / "checkout"), tmp_path / "mark", tmp_path / "screen"
    run = tmp_path / "run"
    options = ("--requeue", "--nodes=2", f"--output={screen}", "launch/slurm.sbatch")
    arguments = ("configs/quickstart.yaml", "run.world_size=4", f"run.dir={run}", "guard.timeout_seconds=20")
    env = {**python_environment(), "STUB_WAIT": str(mark)}
    done = cluster.run("sbatch", *options, *arguments, cwd=checkout, env=env)
    job = re.findall(r"\d+", done.stdout)[-1]
    wait_until(lambda: len(list(run.glob("rank_*.json"))) == 4, 120)
    ranks_of(run)
    cluster.kill_node(lost)
    mark.touch()  # the next start does not wait
    time.sleep(seconds)
    cluster.start_node(lost)
    shown = cluster.wait(job, "COMPLETED", "FAILED", timeout=300)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), screen.read_text()
    found = ranks_of(run)
    assert [(r["RANK"], r["SLURM_NODEID"], r["SLURM_RESTART_COUNT"]) for r in found] == [
        (rank, rank // 2, 1) for rank in range(4)
    ]


@pytest.mark.parametrize("lost", ["node2", "node1"])
def test_a_lost_node_requeues_the_job_which_continues_from_its_last_checkpoint(
    cluster: Slurm, tmp_path: Path, lost: str
) -> None:
    run, screen = tmp_path / "run", tmp_path / "screen"
    arguments = (
        "configs/quickstart.yaml",
        "run.world_size=4",
        "parallel.tp=2",
        "data.prompts_per_step=16",
        "train.minibatches_per_epoch=4",
        f"train.steps={STEPS}",
        "checkpoint.every=2",
        f"run.dir={run}",
    )
    options = ("--requeue", "--nodes=2", f"--output={screen}")
    done = cluster.run("sbatch", *options, "launch/slurm.sbatch", *arguments, cwd=REPOSITORY, env=python_environment())
    job = re.findall(r"\d+", done.stdout)[-1]
    second = run / "checkpoints" / "step_000002" / "complete"
    wait_until(second.exists, 400)
    checkpoint = second.stat().st_mtime_ns
    killed = cluster.kill_node(lost)
    assert len(killed) > 4  # at least slurmd, slurmstepd, the agent and two ranks
    time.sleep(BACK_AFTER_SECONDS)
    cluster.start_node(lost)
    shown = cluster.wait(job, "COMPLETED", "FAILED", timeout=500)
    output = screen.read_text()
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), output[-5000:]
    summary = read_json(run / "summary.json")
    assert (summary["status"], summary["steps"]) == ("done", STEPS)
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert re.search(r"continuing from \S*/checkpoints/step_00000[24]\b", output), output
    assert not second.exists() or second.stat().st_mtime_ns == checkpoint
    assert (run / "checkpoints" / f"step_{STEPS:06d}" / "complete").exists()
