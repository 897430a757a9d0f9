"""Rows that are packed when they are read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grpo_mega.config.algorithm_section import AlgorithmConfig
from grpo_mega.config.schema import TrainConfig
from grpo_mega.data import pack as package
from grpo_mega.data.row_plan import RowShape
from grpo_mega.trainer import packed_rows
from grpo_mega.trainer.batch import build_batch
from grpo_mega.trainer.objective import Objective
from grpo_mega.trainer.packed_rows import PackedRows
from tests.helpers.random_groups import random_groups
from tests.helpers.recorded_rollouts import RolloutGroups
from tests.helpers.thread_ranks import one_rank


def rows_of(groups: RolloutGroups, rewards: list[float]) -> PackedRows:
    sampled = groups.sampled()
    train = TrainConfig(steps=1, max_tokens_per_microbatch=64)
    objective = Objective(AlgorithmConfig(), max_tokens=64)
    batch = build_batch(sampled, np.array(rewards), train, objective, transfer=one_rank(), shape=RowShape())
    return batch.microbatches


def test_a_row_is_packed_when_it_is_read_and_each_time_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[int] = []
    monkeypatch.setattr(packed_rows, "pack", lambda *a, **k: (packed.append(len(a[0])), package.pack(*a, **k))[1])
    rows = rows_of(*random_groups(6))
    assert packed == []
    assert rows.rollout_ids == [row.rollout_ids for row in rows]
    assert packed == [len(ids) for ids in rows.rollout_ids]
    first, again = rows[0], rows[0]
    assert first.token_ids is not again.token_ids
    for name, value in vars(first).items():
        other = getattr(again, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def test_a_part_of_the_rows_keeps_what_was_added_to_them() -> None:
    rows = rows_of(*random_groups(6))
    old = [torch.full((rows.row_tokens,), float(i)) for i in range(len(rows))]
    filled = rows.with_log_probs(old=[None, *old[1:]], ref=old)
    assert [filled.has_old_log_probs(i) for i in range(2)] == [False, True]
    part = filled[1:3]
    assert part.rollout_ids == rows.rollout_ids[1:3]
    assert [row.old_log_probs is old[i] for i, row in enumerate(part, 1)] == [True, True]
    assert [row.ref_log_probs is old[i] for i, row in enumerate(part, 1)] == [True, True]
    whole = filled.with_log_probs(old=[old[0], *[None] * (len(rows) - 1)], ref=None)
    assert [row.old_log_probs is old[i] for i, row in enumerate(whole)] == [True] * len(rows)
    assert filled[0].old_log_probs is None
    with pytest.raises(ValueError, match="is longer than"):
        rows.with_log_probs(old=old[1:], ref=None)
