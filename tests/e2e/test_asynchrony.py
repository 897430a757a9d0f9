"""Sampling during training with a real engine server: versions of tokens, use of prompts, and kills of job and server.

At a temperature of 2 the answers of the pre-trained model have different lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.jobs import SMALL, read_lines, rollouts_of, run_job_successfully
from tests.helpers.servers import RunningServer, serving

STEPS, UPDATES, PER_STEP, GROUP = 6, 2, 8, 4
LIMIT = "guard.timeout_seconds=120"
ASYNCHRONOUS = (
    *SMALL,
    "sampling.temperature=2.0",
    f"train.max_staleness={2 * UPDATES}",
    "train.slice_tokens=1",
    "engine.max_num_seqs=16",
    "algorithm.correction=token_truncated",
    LIMIT,
    "checkpoint.every=1",
    f"train.steps={STEPS}",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    output = tmp_path_factory.mktemp("server") / "log"
    with serving([*SMALL, LIMIT, "engine.max_num_seqs=16"], output, seconds=400.0) as found:
        yield found


def arguments(server: RunningServer, run: Path) -> tuple[str, ...]:
    return (*ASYNCHRONOUS, "engine.placement=server", f"engine.urls=['{server.url}']", f"run.dir={run}")


def trained_prompts(run: Path) -> list[int]:
    rows = [row for step in range(1, STEPS + 1) for row in rollouts_of(run, step)]
    assert len(rows) == STEPS * PER_STEP * GROUP
    return [row["prompt_index"] for row in rows if row["member"] == 0]


def test_a_server_samples_while_the_policy_trains(server: RunningServer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_job_successfully(*arguments(server, run), output=tmp_path / "log")
    lines = read_lines(run / "metrics.jsonl")
    assert 0 < max(line["rollout/staleness_max"] for line in lines) <= 2 * UPDATES
    # the mismatch guard compares the tokens of the present weights with the policy: those of other weights differ
    assert all(line["train/mismatch_max"] < 1e-3 for line in lines)
    several = [row["policy_versions"] for step in range(2, STEPS + 1) for row in rollouts_of(run, step)]
    several = [versions for versions in several if versions is not None]
    assert several, "an answer continues after a weight sync"
    assert all(versions == sorted(versions) for versions in several)
    prompts = trained_prompts(run)
    assert len(set(prompts)) == len(prompts)
