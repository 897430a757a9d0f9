"""A recorded step that is made again equals the recorded one bit for bit; a changed record is named by its stage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from grpo_mega.cli.replay import main as replay
from tests.helpers.finished_runs import ObservedRun

STAGES = ["log-probs", "advantages", "loss", "gradient", "update"]


@pytest.fixture(scope="module")
def recorded(two_ranks: ObservedRun) -> Path:
    """Return the run of two ranks, which keeps the checkpoints of step 2 and later ones."""
    assert not (two_ranks.folder / "checkpoints" / "step_000001").exists()
    return two_ranks.folder


def verdicts(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, str], str | None]:
    """Return exit code, {stage: verdict} and the first stage that differs."""
    code = replay([*arguments, "--json"])
    out = capfd.readouterr()
    assert code < 2, out.err
    found = json.loads(out.out.splitlines()[-1])
    return code, {stage["name"]: stage["verdict"] for stage in found["stages"]}, found["first_difference"]


def test_a_step_equals_the_recorded_one_bit_for_bit_also_over_a_step_without_checkpoint(
    recorded: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Step 2 is made again from the start; the changed record below is made again from the checkpoint of step 2."""
    assert verdicts(capfd, str(recorded), "--step", "2") == (0, dict.fromkeys(STAGES, "equal"), None)


def test_another_layout_agrees_to_rounding(recorded: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, found, first = verdicts(capfd, str(recorded), "--step", "3", "--layout", "tp=2")
    assert (code, first) == (0, None)
    assert set(found.values()) <= {"equal", "within rounding"}
    assert found["log-probs"] == "within rounding"  # it was computed in another layout


def changed_reward(table: pa.Table) -> pa.Table:
    """Return the rollouts with 0.5 more reward for the first of each group."""
    more = pc.if_else(pc.equal(table["member"], 0), 0.5, 0.0)
    return table.set_column(table.schema.get_field_index("reward"), "reward", pc.add(table["reward"], more))


def changed_tokens(table: pa.Table) -> pa.Table:
    """Return the rollouts with the completion's first token in place of all others."""
    column = pa.array([[ids[0]] * len(ids) for ids in table["completion_ids"].to_pylist()], pa.list_(pa.int32()))
    return table.set_column(table.schema.get_field_index("completion_ids"), "completion_ids", column)


@pytest.mark.parametrize(
    ("change", "stage"),
    [(changed_reward, "advantages"), pytest.param(changed_tokens, "log-probs", marks=pytest.mark.long)],
)
def test_the_first_stage_that_differs_is_named(
    recorded: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    change: Callable[[pa.Table], pa.Table],
    stage: str,
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(recorded, copy)
    for path in sorted((copy / "rollouts" / "step_000003").glob("*.parquet")):
        table = pq.read_table(path)
        pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path)
    code, found, first = verdicts(capfd, str(copy), "--step", "3")
    assert (code, first) == (1, stage)
    assert set(list(found.values())[: STAGES.index(stage)]) <= {"equal"}
    assert found["update"] == "differs"
