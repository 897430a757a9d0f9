"""Runs that several test files read; each is made once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest

from tests.helpers.finished_runs import QUICKSTART_STEPS, TWO_RANKS, ObservedRun, Run
from tests.helpers.jobs import QUICKSTART, SMALL, run_job_successfully, running_job


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run the quickstart with a quarter of its prompts and steps; the base is pre-trained unless it is cached."""
    root = tmp_path_factory.mktemp("quickstart")
    arguments = (
        QUICKSTART,
        f"train.steps={QUICKSTART_STEPS}",
        "data.prompts_per_step=16",
        "train.minibatches_per_epoch=4",
        f"run.dir={root / 'run'}",
    )
    return Run(arguments, root / "run", run_job_successfully(*arguments, output=root / "first", timeout_seconds=420))


REWARDS = "[{name: exact}, {name: tests.helpers.bad_rewards.crashes}, {name: tests.helpers.bad_rewards.sleeps}]"


@pytest.fixture(scope="session")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run TP2 x PP2 with two engine replicas of two ranks; two of the three rewards fail for some prompts."""
    root = tmp_path_factory.mktemp("four_ranks")
    arguments = (
        *SMALL,
        "run.world_size=4",
        "parallel.tp=2",
        "parallel.pp=2",
        "engine.tp=2",
        "train.steps=2",
        "train.minibatches_per_epoch=1",
        f"reward.terms={REWARDS}",
        "reward.timeout_seconds=0.5",
        f"run.dir={root / 'run'}",
    )
    return Run(arguments, root / "run", run_job_successfully(*arguments, output=root / "first"))


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> ObservedRun:
    """Run TWO_RANKS to its end, with a trace, a profile of step 2, and a watch on the sockets that listen."""
    root = tmp_path_factory.mktemp("two_ranks")
    found: set[tuple[str, str]] = set()
    keys = ("observe.trace=true", "observe.profile_steps=[2]", f"run.dir={root / 'run'}")
    with running_job([*TWO_RANKS, *keys], root / "log") as job:
        deadline = time.monotonic() + 300
        while job.poll() is None and time.monotonic() < deadline:
            found |= set(_listening(job))
            time.sleep(0.2)
        assert job.poll() == 0, (root / "log.err").read_text()[-4000:]
    return ObservedRun(root / "run", frozenset(found))


def _listening(process: psutil.Popen) -> Iterator[tuple[str, str]]:
    """Yield (program, address) of all listening sockets of a process and its children."""
    with suppress(psutil.Error):
        for member in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error):
                for each in member.net_connections("inet"):
                    if each.status == psutil.CONN_LISTEN:
                        yield " ".join(member.cmdline()[-2:])[:80], each.laddr.ip
