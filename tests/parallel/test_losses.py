"""Losses over a whole rollout have the same value and gradients in layouts that split rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from grpo_mega.config.algorithm_section import AlgorithmConfig
from grpo_mega.trainer.objective import Objective
from grpo_mega.types import UpdateStats
from tests.helpers.recorded_rollouts import (
    ONE,
    Layout,
    Recorded,
    as_array,
    as_row,
    make_rows,
    open_policy,
    with_recorded,
)
from tests.parallel.conftest import Laboratory

# bounds near the ratios of the recorded log-probs, so that some of the tokens are clipped
ALGORITHMS: dict[str, dict[str, Any]] = {
    "gspo": {"clip_low": 0.05, "clip_high": 0.05, "correction": "sequence_truncated", "entropy_coef": 0.05},
    "gmpo": {"clip_low": 0.1, "clip_high": 0.1, "correction": "token_masked", "correction_veto": 0.8},
    "cispo": {"clip_high": 0.05, "correction": "token_truncated", "correction_high": 1.05, "kl_coef": 0.1},
    "grpo": {"dual_clip": 1.1, "entropy_coef": 0.05, "kl_estimator": "k2"},
}
CUT = Layout(4, tp=2, cp=2, sequence_parallel=True)
LONG = (Layout(2), Layout(4, pp=2, vpp=2, more=(("recompute", "full"),)), Layout(8, tp=2, pp=2, cp=2), Layout(4, cp=4))


def compute_gradients(rank: int, recorded: Recorded, layout: Layout) -> dict[str, tuple[UpdateStats, dict[str, Any]]]:
    """Return the gradients of every algorithm. Sampler log-probs are between the old and the reference log-probs."""
    policy = open_policy(rank, recorded, layout)
    rows = with_recorded(make_rows(rank, recorded, layout), recorded).microbatches
    sampler = [
        [(3 * o + r) / 4 for o, r in zip(*pair, strict=True)] for pair in zip(recorded.old, recorded.ref, strict=True)
    ]
    rows = [replace(row, sampler_log_probs=as_row(sampler, row)) for row in rows]
    found = {}
    for name, keys in ALGORITHMS.items():
        loss = Objective(AlgorithmConfig(name=name, **keys), max_tokens=recorded.max_tokens).loss()
        stats, _ = policy.backward(rows, loss)
        tensors = {key: as_array(t) for key, t in policy.full_gradients(1 << 28)}
        found[name] = (stats, tensors if rank == 0 else {})
    return found


@pytest.mark.parametrize("layout", [CUT, *(pytest.param(one, marks=pytest.mark.long) for one in LONG)], ids=str)
def test_every_loss_is_the_same_when_rows_are_split(laboratory: Laboratory, layout: Layout) -> None:
    recorded = laboratory.recorded("deep")
    (wanted,) = laboratory.pool.call(1, compute_gradients, recorded, ONE)
    found = laboratory.pool.call(layout.world, compute_gradients, recorded, layout)
    for name in ALGORITHMS:
        (stats, tensors), (one, expected) = found[0][name], wanted[name]
        assert all(rank[name][0] == stats for rank in found)
        assert abs(stats.sums["loss"] - one.sums["loss"]) <= 1e-5 * one.sums["loss_magnitude"]
        for key, value in one.sums.items():
            assert stats.sums[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
        assert 0 < one.sums["clip_fraction"] < 1, name
        assert "masked" not in one.sums or one.sums["masked"] + one.sums["vetoed"] < 1
        for key, gradient in expected.items():
            assert np.linalg.norm(tensors[key] - gradient) <= 1e-5 * np.linalg.norm(gradient), (name, key)
