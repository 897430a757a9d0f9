"""The groups that `observe.rollouts={sample: N}` selects."""

from __future__ import annotations

import hashlib

from grpo_mega.observe.rollout_files.selection import sampled_groups


def test_the_groups_with_the_smallest_hashes_are_selected() -> None:
    keys = {group: hashlib.sha256(f"rollouts 5 12 {group}".encode()).hexdigest() for group in range(8)}
    chosen = sampled_groups(8, 3, seed=5, step=12)
    assert set(chosen.nonzero()[0].tolist()) == set(sorted(keys, key=keys.__getitem__)[:3])


def test_another_step_or_seed_selects_other_groups() -> None:
    chosen = [tuple(sampled_groups(100, 5, seed=seed, step=step)) for seed, step in ((0, 1), (0, 2), (1, 1))]
    assert len(set(chosen)) == 3


def test_all_groups_are_selected_if_there_are_fewer() -> None:
    assert sampled_groups(2, 5, seed=0, step=1).tolist() == [True, True]
