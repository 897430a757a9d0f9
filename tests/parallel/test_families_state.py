"""Checkpoints and the reference of models with experts and latent attention, whose buffers have their own ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from grpo_mega.checkpoint.manager import LoopState
from grpo_mega.observe.run_folder import RunFolder
from tests.helpers.checkpointed_training import (
    RATES,
    SAVED_AFTER,
    resume_training,
    run_with_checkpoint,
    train_on,
    weights_of,
)
from tests.helpers.family_updates import FamilyLaboratory
from tests.helpers.ranks import RankPool
from tests.helpers.recorded_rollouts import Layout, Recorded, make_rows, open_policy

DEEP = Layout(4, tp=2, pp=2, sequence_parallel=True, ep=2)
WIDE = Layout(4, cp=2, ep=2, etp=2)
LONE_EXPERTS = Layout(4, ep=2)


@pytest.fixture(scope="module")
def families(rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> FamilyLaboratory:
    return FamilyLaboratory(rank_pool, tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize(
    ("model", "layout", "other"),
    [
        pytest.param("deepseek-v3", DEEP, WIDE),
        pytest.param("deepseek-v3", WIDE, DEEP, marks=pytest.mark.long),
        pytest.param("mixtral", WIDE, DEEP, marks=pytest.mark.long),
        pytest.param("qwen3-moe", Layout(2, tp=2, sequence_parallel=True), WIDE, marks=pytest.mark.long),
        pytest.param("glm4-moe", DEEP, LONE_EXPERTS, marks=pytest.mark.long),
        pytest.param("gpt-oss", DEEP, LONE_EXPERTS, marks=pytest.mark.long),
        pytest.param("gpt-oss", LONE_EXPERTS, DEEP, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_resumed_family_is_bit_equal_in_its_layout_and_within_rounding_in_another(
    families: FamilyLaboratory, tmp_path: Path, model: str, layout: Layout, other: Layout
) -> None:
    recorded, pool = families.recorded(model), families.pool
    checkpoints = RunFolder(tmp_path).checkpoints
    whole = pool.call(layout.world, run_with_checkpoint, recorded, layout, checkpoints, timeout_seconds=600.0)
    (checkpoint,) = RunFolder(tmp_path).complete_checkpoints().values()
    again = pool.call(layout.world, resume_training, recorded, layout, checkpoint, timeout_seconds=600.0)
    for (stats, state), (loop, resumed, resumed_state) in zip(whole, again, strict=True):
        assert loop == LoopState(step=1, policy_version=SAVED_AFTER)
        assert resumed == stats[SAVED_AFTER:]
        assert resumed_state == state
    for _, resumed, _ in pool.call(other.world, resume_training, recorded, other, checkpoint, timeout_seconds=600.0):
        for found, wanted in zip(resumed, whole[0][0][SAVED_AFTER:], strict=True):
            assert abs(found.sums["loss"] - wanted.sums["loss"]) <= 1e-5 * wanted.sums["loss_magnitude"]
            assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-5)


def check_state_around_update(rank: int, recorded: Recorded, layout: Layout) -> tuple[bool, bool, bool]:
    """Run one update beside a reference and return three facts.

    The reference equals the policy before the update; the policy changed; a swap restores the policy.
    """
    policy = open_policy(rank, recorded, layout, with_reference=True)
    rows = make_rows(rank, recorded, layout).microbatches
    base, base_weights = policy.log_probs(rows), weights_of(policy)
    train_on(rank, policy, recorded, layout, RATES[:1])
    trained = weights_of(policy)
    with policy.reference():
        reference, reference_weights = policy.log_probs(rows), weights_of(policy)
    same = all(torch.equal(a, b) for a, b in zip(base or [], reference or [], strict=True))
    return same and reference_weights == base_weights, trained != base_weights, weights_of(policy) == trained


@pytest.mark.parametrize("layout", [WIDE, pytest.param(DEEP, marks=pytest.mark.long)], ids=str)
def test_the_reference_keeps_the_initial_experts_of_the_policy(families: FamilyLaboratory, layout: Layout) -> None:
    found = families.pool.call(layout.world, check_state_around_update, families.recorded("deepseek-v3"), layout)
    assert found == [(True, True, True)] * layout.world
