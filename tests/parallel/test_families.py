"""Every family gives the results of transformers in every layout, and its checkpoint is restored bit for bit.

Compared are logits, log-probs, the gradient of each tensor and three updates. docs/measurements/families.md has the
numbers of all cases.
"""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from tests.helpers.family_updates import FAMILY_MODELS, FamilyLaboratory, differences, layouts_of
from tests.helpers.ranks import RankPool
from tests.helpers.recorded_rollouts import OPTIMIZER, Layout

CASES = [
    pytest.param(model, layout, id=f"{model}-{layout}", marks=[] if quick else [pytest.mark.long])
    for model in FAMILY_MODELS
    for quick in (True, False)
    for layout in layouts_of(model, quick=quick)
]
every_case = pytest.mark.parametrize(("model", "layout"), CASES)


@pytest.fixture(scope="module")
def families(rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> FamilyLaboratory:
    return FamilyLaboratory(rank_pool, tmp_path_factory.mktemp("families"))


@every_case
def test_logits_gradients_and_weights_of_three_updates_equal_those_of_transformers(
    families: FamilyLaboratory, model: str, layout: Layout
) -> None:
    found = differences(families.run(model, layout), families.expected(model))
    assert found.logits <= 2e-5
    assert found.log_probs <= 2e-5
    assert found.gradient <= 1e-5, found.gradient_of
    assert found.weights <= 1e-6


@every_case
def test_every_rank_reports_the_loss_and_the_gradient_norm_of_autograd(
    families: FamilyLaboratory, model: str, layout: Layout
) -> None:
    expected = families.expected(model)
    assert max(expected.grad_norms) > OPTIMIZER.clip_grad, "clipping takes no part"
    for record in families.run(model, layout):
        for update, stats in enumerate(record.stats):
            assert abs(stats.sums["loss"] - expected.losses[update]) <= 1e-5 * stats.sums["loss_magnitude"]
            assert stats.grad_norm == pytest.approx(expected.grad_norms[update], rel=1e-5)


@every_case
def test_gathered_tensors_are_bit_equal_to_the_checkpoint_files(
    families: FamilyLaboratory, model: str, layout: Layout
) -> None:
    wanted = load_file(families.recorded(model).model / "model.safetensors")
    found = families.run(model, layout)[0].tensors[0]
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].tobytes() == tensor.numpy().tobytes(), name
