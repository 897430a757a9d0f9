"""Runs that several test files read; each is made once."""

from __future__ import annotations

import pytest

from tests.helpers.finished_runs import QUICKSTART_STEPS, Run
from tests.helpers.jobs import QUICKSTART, SMALL, run_job_successfully


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
