"""The installed Megatron-Core is still wrong without each patch of megatron_patches/fixes.py that needs several ranks.

A failure here means that the release repaired the defect: delete the patch.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_mega.observe.run_folder import RunFolder
from tests.helpers.family_updates import SPREAD, FamilyLaboratory, differences
from tests.helpers.ranks import RankPool
from tests.helpers.recorded_rollouts import Layout
from tests.helpers.unpatched_megatron import measure_family_without, resume_without

INTERLEAVED = Layout(2, pp=2, vpp=2, more=(SPREAD,))
TP2 = Layout(2, tp=2)
TIED_TP2PP2 = Layout(4, tp=2, pp=2)


@pytest.fixture(scope="module")
def families(rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> FamilyLaboratory:
    return FamilyLaboratory(rank_pool, tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize(
    ("patch", "model", "layout"),
    [
        ("pipeline messages", "llama3-rope", INTERLEAVED),
        ("norms of latent vectors", "deepseek-dense", TP2),
        ("shared rotary key", "deepseek-dense", TP2),
    ],
)
def test_gradients_are_wrong_without_the_patch(
    families: FamilyLaboratory, patch: str, model: str, layout: Layout
) -> None:
    recorded = families.recorded(model)
    records = families.pool.call(layout.world, measure_family_without, patch, recorded, layout, timeout_seconds=300.0)
    assert differences(records, families.expected(model)).gradient > 1e-2


@pytest.mark.parametrize("patch", ["step of each parameter"])
def test_a_resumed_optimizer_is_wrong_without_the_patch(families: FamilyLaboratory, tmp_path: Path, patch: str) -> None:
    recorded, checkpoints = families.recorded("qwen3-tied"), RunFolder(tmp_path).checkpoints
    results = families.pool.call(
        TIED_TP2PP2.world, resume_without, patch, recorded, TIED_TP2PP2, checkpoints, timeout_seconds=300.0
    )
    assert any(isinstance(result, str) or result[0] != result[1] for result in results)
