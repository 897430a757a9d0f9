"""Partial rollouts with vLLM: a run that is killed with rollouts in flight continues bit by bit; prompts are trained
once, also if the number of replicas changes.

At a temperature of 2 the answers of the pre-trained model have different lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.jobs import (
    SMALL,
    kill_when_complete,
    read_json,
    read_lines,
    rollouts_of,
    run_job_successfully,
    without_times,
)

STEPS, UPDATES, PER_STEP, GROUP = 4, 2, 8, 4
PARTIAL = (
    *SMALL,
    "sampling.temperature=2.0",
    "sampling.partial={oversubmit: 1.5, slice_tokens: 2, max_staleness: 4}",
    "guard.timeout_seconds=120",
    "checkpoint.every=1",
    f"train.steps={STEPS}",
)
TWO_RANKS = (*PARTIAL, "run.world_size=2", "engine.tp=1")


@dataclass(frozen=True)
class Uninterrupted:
    """A run to its end, its number of ranks, and its arguments without the folder."""

    folder: Path
    ranks: int
    arguments: tuple[str, ...]


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.long)], ids="{0}-ranks".format)
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    root = tmp_path_factory.mktemp("partial")
    arguments = TWO_RANKS if request.param == 2 else (*PARTIAL, "run.world_size=1")
    run_job_successfully(*arguments, f"run.dir={root / 'run'}", output=root / "log")
    return Uninterrupted(root / "run", request.param, arguments)


def trained_prompts(run: Path, steps: range) -> list[int]:
    rows = [row for step in steps for row in rollouts_of(run, step)]
    assert len(rows) == len(steps) * PER_STEP * GROUP
    return [row["prompt_index"] for row in rows if row["member"] == 0]


def test_carried_rollouts_have_tokens_of_several_weights(uninterrupted: Uninterrupted) -> None:
    """The mismatch guard has compared the tokens of the present weights with the policy in every step."""
    run = uninterrupted.folder
    lines = read_lines(run / "metrics.jsonl")
    assert lines[0]["rollout/staleness_max"] == 0
    assert 0 < max(line["rollout/staleness_max"] for line in lines) <= 4
    assert all(line["train/mismatch_max"] < 1e-3 for line in lines)
    assert all(line["rollout/carried_groups"] >= PER_STEP / 2 for line in lines)
    rows = [row for step in range(2, STEPS + 1) for row in rollouts_of(run, step)]
    several = [row["policy_versions"] for row in rows if row["policy_versions"] is not None]
    assert several, "an answer continues after a weight sync"
    assert all(versions == sorted(versions) for versions in several)
    prompts = trained_prompts(run, range(1, STEPS + 1))
    assert len(set(prompts)) == len(prompts)
    summary = read_json(run / "summary.json")
    assert summary["carried"] == {
        "groups": lines[-1]["rollout/carried_groups"],
        "tokens": lines[-1]["rollout/carried_tokens"],
    }


def test_a_run_killed_with_rollouts_in_flight_equals_the_uninterrupted_run(
    uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    run, expected, ranks = tmp_path / "run", uninterrupted.folder, uninterrupted.ranks
    kill_when_complete(run, 2, tmp_path / "killed", uninterrupted.arguments)
    parts = sorted(path.name for path in (run / "checkpoints" / "step_000002" / "carried").iterdir())
    assert parts == [f"rank_{rank:05d}.safetensors" for rank in range(ranks)]
    run_job_successfully(*uninterrupted.arguments, f"run.dir={run}", output=tmp_path / "continued")
    ours, theirs = (
        [without_times(line) for line in read_lines(folder / "metrics.jsonl")] for folder in (run, expected)
    )
    assert ours == theirs
    files = sorted(path.relative_to(expected) for path in (expected / "rollouts").rglob("*.parquet"))
    files += sorted(path.relative_to(expected) for path in (expected / "checkpoints").rglob("carried/*"))
    assert len(files) == ranks * (STEPS + len(list((expected / "checkpoints").iterdir())))
    for name in files:
        assert (run / name).read_bytes() == (expected / name).read_bytes(), name
    assert read_json(run / "summary.json")["policy_digest"] == read_json(expected / "summary.json")["policy_digest"]


@pytest.mark.long
def test_another_number_of_replicas_continues_the_carried_rollouts(tmp_path: Path) -> None:
    run = tmp_path / "run"
    kill_when_complete(run, 2, tmp_path / "killed", TWO_RANKS)
    one_rank = (*PARTIAL, "run.world_size=1")
    run_job_successfully(*one_rank, f"run.dir={run}", output=tmp_path / "continued")
    assert "carried rollouts of 2 prompt shards are dealt out to 1" in (tmp_path / "continued.err").read_text()
    prompts = trained_prompts(run, range(1, STEPS + 1))
    assert len(set(prompts)) == len(prompts)
    assert max(line["rollout/staleness_max"] for line in read_lines(run / "metrics.jsonl")[2:]) > 0
