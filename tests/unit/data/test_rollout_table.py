"""The table of a step from the rollouts of several ranks, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from grpo_mega.data import rollout_table
from grpo_mega.data.rollout_table import RolloutTable, gather_table
from grpo_mega.parallel.topology import Topology
from grpo_mega.types import Completion, Prompt, Reward, Rollout
from tests.helpers.thread_ranks import on_ranks, one_rank

PROMPTS = [Prompt(30, "", (1, 2), "", "a"), Prompt(31, "", (3,), "", "b")]
SEVERAL_TURNS = Completion([4, 5, 6], [0.0] * 3, "stop", 7, "", None, [True, False, True], 2)
ROLLOUTS = [
    Rollout(PROMPTS[0], Completion([4], [0.0], "eos", 6, ""), Reward(0.1, {"exact": 1.0}), 0),
    Rollout(PROMPTS[0], Completion([4, 5], [0.0] * 2, "length", 6, ""), Reward(None, {"format": 2.0}, ("exact",)), 1),
    Rollout(
        PROMPTS[1], Completion([4, 5, 6], [0.0] * 3, "stop", 7, "", None, [1, 0, 1], 2), Reward(0.2), 1, ((2, 0.5),)
    ),
    Rollout(PROMPTS[1], Completion([4], [0.0], "eos", 7, ""), Reward(-3.0), 0, ()),
]


def table(rollouts: list[Rollout] = ROLLOUTS) -> RolloutTable:
    names = ("exact", "format")
    return gather_table(
        PROMPTS, 2, dict(enumerate(rollouts)), prompt_shard=0, component_names=names, sum_over_ranks=lambda array: array
    )


def test_columns_by_hand() -> None:
    found = table()
    expected: dict[str, Any] = {
        "prompt_index": [30, 30, 31, 31],
        "data_sets": ["a", "b"],
        "prompt_tokens": [2, 2, 1, 1],
        "completion_tokens": [1, 2, 3, 1],
        "loss_tokens": [1, 2, 2, 1],
        "num_tokens": [3, 4, 4, 2],
        "reward": [0.1, np.nan, 0.2, -3.0],
        "is_scored": [True, False, True, True],
        "components": [[1, np.nan], [np.nan, 2], [np.nan] * 2, [np.nan] * 2],
        "has_failed": [False, True, False, False],
        "is_truncated": [False, True, False, False],
        "num_turns": [1, 1, 2, 1],
        "policy_version": [6, 6, 7, 7],
        "replica": [0, 1, 1, 0],
        "prompt_shard": [0] * 4,
        "has_experts": [False] * 4,
        "has_steps": [False, False, True, True],
        "step_offsets": [0, 0, 0, 1, 1],
        "step_ends": [2],
        "step_values": [0.5],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(getattr(found, name), values, name)
    assert (len(found), found.num_groups) == (4, 2)
    assert [part.tolist() for part in found.steps_of(2)] == [[2], [0.5]]


def test_the_rollouts_of_a_data_set_are_found() -> None:
    assert table().is_from("b").tolist() == [False, False, True, True]


def test_a_table_has_about_sixty_bytes_per_rollout() -> None:
    completion = ROLLOUTS[0].completion
    prompts = [Prompt(i, "", (1, 2), "", "a long name of a data set") for i in range(64)]
    own = {i: Rollout(prompts[i // 16], completion, Reward(0.5, {"exact": 0.5}), 0) for i in range(1024)}
    found = gather_table(
        prompts, 16, own, prompt_shard=0, component_names=("exact",), sum_over_ranks=one_rank().collectives.sum
    )
    assert 50 < found.nbytes / 1024 - 8 < 65


def test_the_first_term_that_applies_decides_about_full_marks() -> None:
    assert table().has_full_marks({"exact": 1.0, "format": 2.0}).tolist() == [True, False, False, False]
    assert table().has_full_marks({"exact": 2.0, "format": 2.0}).tolist() == [False] * 4


@pytest.mark.parametrize("block_rows", [1, 3, 4])
def test_ranks_get_the_same_table_bit_for_bit(monkeypatch: pytest.MonkeyPatch, block_rows: int) -> None:
    monkeypatch.setattr(rollout_table, "_BLOCK_ROWS", block_rows)

    def gather(transfer: Any) -> RolloutTable:
        rank = transfer.ranks.rank
        own = {row: ROLLOUTS[row] for row in ([1, 2], [], [3, 0])[rank]}
        names = ("exact", "format")
        collectives = transfer.collectives
        return gather_table(PROMPTS, 2, own, prompt_shard=rank, component_names=names, sum_over_ranks=collectives.sum)

    for found in on_ranks(Topology(3), gather):
        assert found.prompt_shard.tolist() == [2, 0, 0, 2]
        assert found.reward.tobytes() == table().reward.tobytes()
        assert found.step_values.tobytes() == table().step_values.tobytes()
        assert found.policy_version.tolist() == [6, 6, 7, 7]
        assert found.component_names == ("exact", "format")


def test_a_missing_and_a_doubled_rollout_are_errors() -> None:
    for rows, message in (([0, 1, 2], "3 of 4 rollouts, 3 rows"), ([0, 1], "2 of 4 rollouts, 2 rows")):
        own = {row: ROLLOUTS[row] for row in rows}
        with pytest.raises(RuntimeError, match=message):
            gather_table(
                PROMPTS,
                2,
                own,
                prompt_shard=0,
                component_names=("exact", "format"),
                sum_over_ranks=one_rank().collectives.sum,
            )
    twice = {row: ROLLOUTS[row] for row in range(4)}
    with pytest.raises(RuntimeError, match="4 of 4 rollouts, 8 rows"):
        gather_table(
            PROMPTS, 2, twice, prompt_shard=0, component_names=("exact", "format"), sum_over_ranks=lambda a: 2 * a
        )


def test_a_reward_that_is_not_a_number_is_an_error() -> None:
    lost = Rollout(PROMPTS[0], ROLLOUTS[0].completion, Reward(float("nan")), 0)
    with pytest.raises(ValueError, match="prompt 30 is nan"):
        table([lost, *ROLLOUTS[1:]])


def test_groups_are_taken_and_appended_with_their_steps() -> None:
    found = table().append(table()).take_groups([1, 2, 1])
    assert found.prompt_index.tolist() == [31, 31, 30, 30, 31, 31]
    assert found.data_sets.tolist() == ["b", "a", "b"]
    assert found.step_offsets.tolist() == [0, 1, 1, 1, 1, 2, 2]
    assert found.step_values.tolist() == [0.5, 0.5]
    assert found.components[2].tolist() == pytest.approx([1.0, np.nan], nan_ok=True)
