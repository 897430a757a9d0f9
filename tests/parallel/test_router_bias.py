"""Biases of routers move with the load of the experts, alike in every layout, and belong to the policy's weights.

The loads are those of transformers, which computes each rollout alone and so without padding.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_mega.config.algorithm_section import AlgorithmConfig
from tests.helpers.family_updates import FAMILY_MODELS, record_family
from tests.helpers.ranks import RankPool
from tests.helpers.recorded_rollouts import LOSS, ONE, Layout, Recorded, make_config, make_rows, ranks_of, with_recorded

RATE = 0.05
NUM_UPDATES = 2
FULL = (("recompute", "full"),)
MOE = (("recompute", "selective"), ("recompute_modules", ("moe",)))
LAYOUTS = [
    ONE,
    Layout(2),
    Layout(2, ep=2),
    Layout(4, pp=2, cp=2, ep=2, more=MOE),
    pytest.param(Layout(2, tp=2, sequence_parallel=True, more=FULL), marks=pytest.mark.long),
    pytest.param(Layout(8, tp=2, pp=2, cp=2, sequence_parallel=True, ep=2), marks=pytest.mark.long),
]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return record_family(tmp_path_factory.mktemp("router_bias") / "model", FAMILY_MODELS["deepseek-v3"], 7)


def expected_biases(recorded: Recorded) -> dict[str, Tensor]:
    """Return the biases after the updates, from the choices of transformers for all tokens of all rollouts."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(recorded.model, dtype=torch.float32)
    gates = {
        f"model.layers.{i}.mlp.gate.e_score_correction_bias": layer.mlp.gate
        for i, layer in enumerate(model.model.layers)
        if hasattr(layer.mlp, "gate")
    }
    assert gates, "the model has experts"
    loads = {name: torch.zeros_like(gate.e_score_correction_bias) for name, gate in gates.items()}

    def count(name: str, _module: Any, _arguments: Any, found: tuple[Tensor, Tensor, Tensor]) -> None:
        loads[name] += torch.bincount(found[2].flatten(), minlength=len(loads[name]))

    for name, gate in gates.items():
        gate.register_forward_hook(partial(count, name))
    for _ in range(NUM_UPDATES):
        for rollout in recorded.groups.rollouts:
            with torch.no_grad():
                model(input_ids=torch.tensor([[*rollout.prompt.token_ids, *rollout.completion.token_ids]]))
        for name, gate in gates.items():
            bias, load = gate.e_score_correction_bias, loads[name]
            bias.copy_(bias + torch.sign(load.mean() - load) * RATE)
            load.zero_()
    return {name: gate.e_score_correction_bias for name, gate in gates.items()}


def open_moving(rank: int, recorded: Recorded, layout: Layout, rate: float) -> Any:
    from grpo_mega.models.config_readers import read_spec
    from grpo_mega.policy.policy import MegatronPolicy

    algorithm = AlgorithmConfig(router_bias_update_rate=rate)
    config = make_config(recorded, layout).model_copy(update={"algorithm": algorithm})
    spec = read_spec(recorded.model)
    return MegatronPolicy(config, spec, recorded.model, ranks_of(rank, layout), with_reference=True)


def biases_of(policy: Any) -> dict[str, Any]:
    tensors = policy.full_tensors(1 << 28)
    return {name: t.numpy().copy() for name, t in tensors if name.endswith("e_score_correction_bias")}


def train_biases(rank: int, recorded: Recorded, layout: Layout, rate: float, folder: Path) -> dict[str, Any]:
    """Update with learning rate 0, and return the biases: of the policy, and of a policy that loads its checkpoint."""
    policy = open_moving(rank, recorded, layout, rate)
    batch = with_recorded(make_rows(rank, recorded, layout), recorded)
    own = policy.log_probs(batch.microbatches)
    for _ in range(NUM_UPDATES):
        policy.update(batch.microbatches, LOSS, 0.0)
        policy.log_probs(batch.microbatches)  # counts nothing
    moved = policy.log_probs(batch.microbatches)
    with policy.reference():
        of_reference = policy.log_probs(batch.microbatches)
    biases = biases_of(policy)
    if own is not None:
        assert all(torch.equal(a, b) for a, b in zip(own, of_reference, strict=True)), "the reference moved"
        assert all(torch.equal(a, b) for a, b in zip(own, moved, strict=True)) == (rate == 0)
    if rank == 0:
        folder.mkdir()
    torch.distributed.barrier()
    policy.save(folder, {})
    return biases


def skip_update(rank: int, recorded: Recorded, layout: Layout) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the biases after one update, and after another one that is skipped."""
    policy = open_moving(rank, recorded, layout, RATE)
    batch = with_recorded(make_rows(rank, recorded, layout), recorded)
    policy.update(batch.microbatches, LOSS, 0.0)
    before = biases_of(policy)
    policy.update(batch.microbatches, LOSS, 0.0, lambda _: False)
    return before, biases_of(policy)


@pytest.mark.parametrize("layout", [ONE, pytest.param(Layout(2, ep=2), marks=pytest.mark.long)], ids=str)
def test_a_skipped_update_moves_no_bias(rank_pool: RankPool, recorded: Recorded, layout: Layout) -> None:
    for before, after in rank_pool.call(layout.world, skip_update, recorded, layout):
        assert any(bias.any() for bias in before.values())
        assert all((after[name] == bias).all() for name, bias in before.items())


def load_biases(rank: int, recorded: Recorded, folder: Path) -> dict[str, Any]:
    policy = open_moving(rank, recorded, ONE, RATE)
    policy.load(folder)
    return biases_of(policy)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_biases_move_by_the_sign_of_the_load_in_every_layout_and_are_saved(
    rank_pool: RankPool, recorded: Recorded, layout: Layout, tmp_path: Path
) -> None:
    wanted = expected_biases(recorded)
    for found in rank_pool.call(layout.world, train_biases, recorded, layout, RATE, tmp_path / "state"):
        assert found.keys() == wanted.keys()
        for name, bias in wanted.items():
            assert torch.equal(torch.from_numpy(found[name]), bias), name
    (restored,) = rank_pool.call(1, load_biases, recorded, tmp_path / "state")
    assert all(torch.equal(torch.from_numpy(restored[name]), bias) for name, bias in wanted.items())


def test_without_a_rate_biases_stay(rank_pool: RankPool, recorded: Recorded, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    (found,) = rank_pool.call(1, train_biases, recorded, ONE, 0.0, tmp_path / "state")
    tensors = load_file(recorded.model / "model.safetensors")
    assert all(torch.equal(torch.from_numpy(bias), tensors[name]) for name, bias in found.items())


def move_by_hand(rank: int, recorded: Recorded) -> list[list[float]]:
    """Return the changes of the biases for the loads 4, 0, 2, 2, ... whose mean is 2."""
    from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias

    policy = open_moving(rank, recorded, ONE, RATE)
    routers = [m for model in policy.parts.models for m in model.modules() if hasattr(m, "local_tokens_per_expert")]
    before = [router.expert_bias.clone() for router in routers]
    for router in routers:
        router.local_tokens_per_expert.fill_(2.0)
        router.local_tokens_per_expert[:2] = torch.tensor([4.0, 0.0])
    _update_router_expert_bias(policy.parts.ddps, policy.parts.config)
    return [(router.expert_bias - old).tolist() for router, old in zip(routers, before, strict=True)]


def test_the_change_of_a_bias_by_hand(rank_pool: RankPool, recorded: Recorded) -> None:
    (changes,) = rank_pool.call(1, move_by_hand, recorded)
    for change in changes:
        assert change == pytest.approx([-RATE, RATE, *[0.0] * (len(change) - 2)], abs=1e-7)
