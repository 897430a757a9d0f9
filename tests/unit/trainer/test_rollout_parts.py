"""Rollouts of a step as columns, and which rank writes which of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from grpo_mega.config.schema import Config
from grpo_mega.observe.background_writer import BackgroundWriter
from grpo_mega.observe.rollout_files.part_writer import RolloutFileError
from grpo_mega.observe.rollout_files.reader import read_rows, read_step
from grpo_mega.observe.rollout_files.selection import sampled_groups
from grpo_mega.observe.run_folder import RunFolder
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.parallel.topology import Topology
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.trainer.batch import TrainBatch
from grpo_mega.trainer.rollout_parts import RolloutParts, writes_rollouts
from grpo_mega.trainer.step_metrics import StepResult
from grpo_mega.types import Completion, Prompt, Reward, Rollout
from grpo_mega.weight_sync.sync import SyncReport
from tests.helpers.observed_rollouts import columns_of_rollouts
from tests.helpers.planner_cases import config_of
from tests.helpers.token_values import token_values

SYNC = SyncReport(seconds=1.0, verify_seconds=0.0, written_bytes=0, received_bytes=0, policy_digest="")


def make_rollout(index: int = 7, replica: int = 1, **changed: Any) -> Rollout:
    return replace(
        Rollout(
            prompt=Prompt(index=index, text="12+34=", token_ids=(1, 2), answer="46", data_set="sums"),
            completion=Completion((4, 6, 0), (-0.5, -0.25, -0.125), "eos", 3, "46"),
            reward=Reward(1.0, {"exact": 1.0}, ("format",)),
            replica=replica,
        ),
        **changed,
    )


def columns_of(rollouts: list[Rollout], olds: list[Any], advantages: list[float] | None = None) -> Any:
    return columns_of_rollouts(rollouts, advantages or [0.0] * len(rollouts), olds, group_size=len(rollouts))


def rows_of(tmp_path: Path, columns: Any) -> list[dict[str, Any]]:
    from grpo_mega.observe.rollout_files.part_writer import write_part

    write_part(tmp_path, 0, 1, columns)
    return read_rows(tmp_path)


def test_a_row_has_all_data_for_scripts_and_replay(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, columns_of([make_rollout()], [[-1.0, -2.0, -3.0]], [0.5]))
    assert row == {
        "step": 4,
        "group": 0,
        "member": 0,
        "prompt_index": 7,
        "data_set": "sums",
        "prompt": "12+34=",
        "completion": "46",
        "answer": "46",
        "reward": 1.0,
        "reward_components": {"exact": 1.0},
        "reward_failures": ["format"],
        "advantage": 0.5,
        "stop_reason": "eos",
        "policy_version": 3,
        "replica": 1,
        "num_turns": 1,
        "prompt_ids": [1, 2],
        "completion_ids": [4, 6, 0],
        "sampler_log_probs": [-0.5, -0.25, -0.125],
        "old_log_probs": [-1.0, -2.0, -3.0],
        "loss_mask": None,
        "policy_versions": None,
        "steps": None,
        "expert_choices": None,
    }


def test_tokens_of_the_environment_have_a_false_mask_and_zero_old_log_probs(tmp_path: Path) -> None:
    several = replace(make_rollout().completion, loss_mask=(True, False, True), num_turns=2)
    rollouts = [make_rollout(completion=several, steps=((0, 0.5), (2, 1.0))), make_rollout()]
    first, second = rows_of(tmp_path, columns_of(rollouts, [[-1.0, -3.0], None]))
    assert first["old_log_probs"] == [-1.0, 0.0, -3.0]
    assert (first["loss_mask"], first["num_turns"]) == ([True, False, True], 2)
    assert first["steps"] == [(0, 0.5), (2, 1.0)]
    assert (second["old_log_probs"], second["loss_mask"], second["steps"]) == (None, None, None)
    with pytest.raises(ValueError, match="old_log_probs must have one entry per token that the policy sampled"):
        columns_of([make_rollout(completion=several)], [[-1.0, -2.0, -3.0]])


def test_tokens_of_several_weights_have_their_versions(tmp_path: Path) -> None:
    """A rollout whose tokens all have `policy_version` has no versions per token."""
    carried = replace(make_rollout().completion, loss_mask=(True, False, True), num_turns=2, policy_versions=(1, 1, 3))
    old, equal = (
        replace(carried, policy_versions=(2, 2, 2), policy_version=2),
        replace(carried, policy_versions=(3,) * 3),
    )
    rollouts = [make_rollout(completion=each) for each in (carried, old, equal, make_rollout().completion)]
    rows = rows_of(tmp_path, columns_of(rollouts, [None] * 4))
    assert [row["policy_versions"] for row in rows] == [[1, -1, 3], None, None, None]
    assert [row["policy_version"] for row in rows] == [3, 2, 3, 3]


def test_routing_records_have_their_shape_and_minus_one_for_no_record(tmp_path: Path) -> None:
    record = torch.arange(12, dtype=torch.uint8).view(3, 2, 2)
    record[1] = 255
    with_record = make_rollout(completion=replace(make_rollout().completion, expert_choices=record))
    columns = columns_of([make_rollout(), with_record], [None, None])
    assert columns.expert_shape == (2, 2)
    first, second = rows_of(tmp_path, columns)
    assert first["expert_choices"] is None
    assert second["expert_choices"] == [0, 1, 2, 3, -1, -1, -1, -1, 8, 9, 10, 11]
    assert read_step(tmp_path).expert_shape == (2, 2)


def result_of(num_groups: int, replica: int, replicas: int) -> StepResult:
    """Groups of two rollouts that the replicas sampled in turns, as the first rank of one of them has them."""
    rollouts = [make_rollout(group, group % replicas) for group in range(num_groups) for _ in range(2)]
    whole = SampledGroups.of(rollouts, 2)
    own = np.flatnonzero(whole.table.replica == replica)
    groups = replace(whole, tokens=whole.tokens.select(own), texts=["46"] * len(own), failures=[()] * len(own))
    batch = cast("TrainBatch", None)
    return StepResult(3, groups, batch, token_values([]), np.full(len(rollouts), 0.25), [], SYNC, kl_coef=0.0)


def written(tmp_path: Path, config: Config, num_groups: int = 5, replicas: int = 2) -> Path:
    topology = Topology(2 * replicas, engine_tp=2)
    with BackgroundWriter() as writer:
        for rank in range(topology.world_size):
            ranks = Ranks(topology, topology.coordinates(rank), torch.device("cpu"))
            if writes_rollouts(ranks):
                result = result_of(num_groups, rank // 2, replicas)
                columns = RolloutParts(config, RunFolder(tmp_path), ranks, writer).write(result)
                assert set(columns.group) == set(range(rank // 2, num_groups, replicas))
    return RunFolder(tmp_path).rollouts_of(3)


def test_the_first_rank_of_each_replica_writes_what_its_replica_sampled(tmp_path: Path) -> None:
    folder = written(tmp_path, config_of())
    assert sorted(path.name for path in folder.iterdir()) == ["part-00000.parquet", "part-00001.parquet"]
    assert [row["group"] for row in read_rows(folder / "part-00001.parquet")] == [1, 1, 3, 3]
    rows = read_rows(folder)
    assert [(row["group"], row["member"], row["prompt_index"]) for row in rows] == [
        (group, member, group) for group in range(5) for member in (0, 1)
    ]


def test_a_sample_has_whole_groups_by_the_stated_rule(tmp_path: Path) -> None:
    folder = written(tmp_path, config_of(observe={"rollouts": {"sample": 2}}, run={"seed": 5}), num_groups=9)
    rows = read_rows(folder)
    chosen = sampled_groups(9, 2, seed=5, step=3).nonzero()[0].tolist()
    assert [row["group"] for row in rows] == [group for group in chosen for _ in range(2)]
    assert read_step(folder).problems == (), "a replica without a chosen group has a part without rows"


def test_none_writes_nothing(tmp_path: Path) -> None:
    assert not written(tmp_path, config_of(observe={"rollouts": "none"})).exists()


def test_an_error_of_a_step_is_raised_in_the_next_step(tmp_path: Path) -> None:
    topology = Topology(1)
    ranks = Ranks(topology, topology.coordinates(0), torch.device("cpu"))
    (tmp_path / "rollouts").write_text("in the way")
    writer = BackgroundWriter()
    parts = RolloutParts(config_of(), RunFolder(tmp_path), ranks, writer)
    parts.write(result_of(2, 0, 1))
    writer.wait()
    with pytest.raises(RolloutFileError, match=r"rollouts of step 3: .*part-00000\.parquet cannot be written"):
        parts.write(result_of(2, 0, 1))
    writer.close()
