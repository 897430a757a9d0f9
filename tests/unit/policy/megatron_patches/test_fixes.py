"""Patches of Megatron's arithmetic, tested without ranks against formulas from which unpatched Megatron differs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_mega.models.config_readers import spec_from_config
from grpo_mega.parallel.topology import Topology
from grpo_mega.policy.megatron_patches import fixes
from grpo_mega.policy.weight_source import weight_copies
from tests.helpers.family_configs import raw_family_config

from megatron.core.transformer.moe import moe_utils  # isort: skip - after megatron_patches, which prepares the import


def best_of_groups(scores: list[float], size: int, best: int, group_topk: int, topk: int) -> list[int]:
    """Return the experts of one token: the best groups by the sum of their `best` scores, then their best experts."""
    groups = [scores[i : i + size] for i in range(0, len(scores), size)]
    order = sorted(range(len(groups)), key=lambda g: -sum(sorted(groups[g])[-best:]))[:group_topk]
    among = [g * size + i for g in order for i in range(size)]
    return sorted(sorted(among, key=lambda e: -scores[e])[:topk])


@pytest.mark.parametrize(("family", "best"), [("deepseek_v2", 1), ("deepseek_v3", 2), ("glm4_moe", 2)])
@pytest.mark.parametrize("topk", [2, 3, 4])
def test_expert_groups_are_scored_by_the_rule_of_the_family_for_every_topk(family: str, best: int, topk: int) -> None:
    fixes.fit_to(spec_from_config(raw_family_config(family), "config.json"))
    scores: Tensor = torch.rand(200, 16, generator=torch.Generator().manual_seed(0))
    values, experts = moe_utils.group_limited_topk(scores, topk, 200, 16, 4, 2)
    for token in range(200):
        assert sorted(experts[token].tolist()) == best_of_groups(scores[token].tolist(), 4, best, 2, topk)
    assert torch.equal(values, scores.gather(1, experts))


def test_experts_are_separated_from_dense_layers() -> None:
    model = torch.nn.Module()
    model.decoder = torch.nn.Module()
    names = ("mlp.experts.local_experts.0.linear_fc1", "mlp.experts.gate_up", "mlp.shared_experts.linear_fc1")
    for name in names:
        holder: torch.nn.Module = model.decoder
        for part in ("layers", "0", *name.split(".")):
            if not hasattr(holder, part):
                holder.add_module(part, torch.nn.Module())
            holder = getattr(holder, part)
        holder.weight = torch.nn.Parameter(torch.zeros(1))
    fixes.separate_experts(model)
    apart = {name: not getattr(p, "allreduce", True) for name, p in model.named_parameters()}
    assert apart == {
        f"decoder.layers.0.{name}.weight": flag for name, flag in zip(names, (True, True, False), strict=True)
    }


@pytest.mark.parametrize(
    ("topology", "copies"),
    [
        (Topology(4, tp=2), [[0, 1], [2, 3]]),
        (Topology(4, tp=2, pp=2), [[0, 1, 2, 3]]),
        (Topology(4, ep=2), [[0, 1], [2, 3]]),
        (Topology(8, tp=2, ep=4), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (Topology(8, pp=2, etp=2), [[0, 1, 4, 5], [2, 3, 6, 7]]),
        (Topology(12, tp=2, etp=3), [list(range(6)), list(range(6, 12))]),
    ],
    ids=str,
)
def test_a_copy_of_the_weights_is_on_the_fewest_adjacent_ranks(topology: Topology, copies: list[list[int]]) -> None:
    assert weight_copies(topology) == copies


def test_an_optimizer_without_parameters_has_the_step_of_the_others_in_a_checkpoint() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    trained, without = torch.optim.AdamW([weight]), torch.optim.AdamW([{"params": []}])
    weight.grad = torch.ones(3)
    trained.step()
    trained.step()
    chain: Any = SimpleNamespace(
        chained_optimizers=[SimpleNamespace(optimizer=trained), SimpleNamespace(optimizer=without)]
    )
    with fixes.placeholder_steps(chain):
        for adam in (trained, without):  # the check of distrib_optimizer.py:641
            assert {state["step"].item() for state in adam.state_dict()["state"].values()} == {2.0}
    assert without.state == {}
    assert list(trained.state) == [weight]
