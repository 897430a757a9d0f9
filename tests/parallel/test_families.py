"""Every family trains as transformers does, in every layout: log-probs, gradients of each tensor, three updates, and
the checkpoint comes back bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.helpers.ranks import RankPool
from tests.parallel.families import DENSE, DENSE_LAYOUTS, FAMILY_MODELS, MOE_LAYOUTS, FamilyLaboratory
from tests.parallel.recorded import OPTIMIZER, Layout

CASES = [
    pytest.param(model, layout, id=f"{model}-{layout}")
    for model in FAMILY_MODELS
    for layout in (DENSE_LAYOUTS if model in DENSE else MOE_LAYOUTS)
]
every_case = pytest.mark.parametrize(("model", "layout"), CASES)


@pytest.fixture(scope="module")
def families(rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> FamilyLaboratory:
    return FamilyLaboratory(rank_pool, tmp_path_factory.mktemp("families"))


@every_case
def test_log_probs_equal_those_of_transformers(families: FamilyLaboratory, model: str, layout: Layout) -> None:
    expected = families.expected(model).log_probs[1.0]
    found = [record.log_probs for record in families.run(model, layout) if record.is_last_stage]
    assert {i for rank in found for i in rank} == set(range(len(expected)))
    for rank in found:
        for rollout, values in rank.items():
            assert np.abs(np.array(values) - np.array(expected[rollout])).max() <= 2e-5, rollout


@every_case
def test_gradients_of_every_tensor_equal_autograd_over_three_updates(
    families: FamilyLaboratory, model: str, layout: Layout
) -> None:
    expected, records = families.expected(model), families.run(model, layout)
    for update, wanted in enumerate(expected.gradients):
        found = records[0].gradients[update]
        assert wanted.keys() == {name for name in found if not name.endswith("e_score_correction_bias")}
        for name, gradient in wanted.items():
            size = float(gradient.norm())
            assert size > 1e-5, f"{name} has no gradient that could be wrong"
            assert np.linalg.norm(found[name] - gradient.numpy()) <= 1e-5 * size, (update, name)
    for record in records:
        for update, stats in enumerate(record.stats):
            assert abs(stats.sums["loss"] - expected.losses[update]) <= 1e-5 * stats.sums["loss_magnitude"]
            assert stats.grad_norm == pytest.approx(expected.grad_norms[update], rel=1e-5)
            assert stats.grad_norm > OPTIMIZER.clip_grad, "clipping takes no part"


@every_case
def test_weights_equal_those_of_adamw_after_each_of_three_updates(
    families: FamilyLaboratory, model: str, layout: Layout
) -> None:
    tensors, expected = families.run(model, layout)[0].tensors, families.expected(model).tensors
    for update, wanted in enumerate(expected):
        assert tensors[update].keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert np.abs(tensors[update][name] - tensor.numpy()).max() <= 1e-6, (update, name)


@every_case
def test_whole_tensors_are_the_files_bit_for_bit(families: FamilyLaboratory, model: str, layout: Layout) -> None:
    wanted = load_file(families.recorded(model).model / "model.safetensors")
    found = families.run(model, layout)[0].tensors[0]
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].tobytes() == tensor.numpy().tobytes(), name
