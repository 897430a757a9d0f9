"""Rollouts move from the ranks that sampled them to the ranks that train them, and numbers go back, on real ranks."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from grpo_mega.data.rollout_tokens import RolloutTokens
from grpo_mega.parallel.array_collectives import ArrayCollectives
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.parallel.topology import Topology
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.trainer.rollout_transfer import RolloutTransfer
from grpo_mega.types import Completion, Prompt, Reward, Rollout
from tests.parallel.conftest import Laboratory

GROUP, PROMPTS = 3, 4
LAYOUTS = [
    Topology(1),
    Topology(2),
    Topology(4, tp=2, engine_tp=4),
    Topology(4, pp=2, engine_tp=2),
    Topology(8, tp=2, pp=2, engine_tp=1),
    Topology(8, cp=2, engine_tp=2, engine_dp=2),
]


def make_rollouts(*, with_experts: bool) -> list[Rollout]:
    """Return rollouts of different lengths; some tokens are an environment's, and some rollouts have no record."""
    rng = random.Random(4)
    found = []
    for i in range(PROMPTS * GROUP):
        if i % GROUP == 0:
            prompt = Prompt(40 + i // GROUP, "", tuple(rng.randrange(99) for _ in range(rng.randrange(1, 6))), "")
        length = rng.randrange(1, 9)
        mask = [True] + [rng.random() < 0.7 for _ in range(length - 1)]
        log_probs = [-rng.random() if own else 0.0 for own in mask]
        experts = None
        if with_experts and i % 4:
            size = len(prompt.token_ids) + length - 1
            experts = torch.randint(0, 9, (size, 2, 2), generator=torch.Generator().manual_seed(i)).to(torch.uint8)
        tokens = [rng.randrange(99) for _ in mask]
        completion = Completion(tokens, log_probs, "eos", 7, "", expert_choices=experts, loss_mask=mask)
        found.append(Rollout(prompt, completion, Reward(rng.random(), {"exact": 1.0}), i % 3, ((0, 0.5),) * (i % 3)))
    return found


def transfer_there_and_back(rank: int, topology: Topology, with_experts: bool) -> None:
    """Check everything on this rank; an exception of a rank fails the test."""
    ranks = Ranks(topology, topology.coordinates(rank), torch.device("cpu"))
    transfer = RolloutTransfer(ArrayCollectives(ranks))
    rollouts = make_rollouts(with_experts=with_experts)
    prompts = [rollout.prompt for rollout in rollouts[::GROUP]]
    shard_of = [group % topology.num_prompt_shards for group in range(PROMPTS) for _ in range(GROUP)]
    is_sampler = topology.prompt_shard_ranks(ranks.at.prompt_shard)[0] == rank
    own = {i: r for i, r in enumerate(rollouts) if is_sampler and shard_of[i] == ranks.at.prompt_shard}
    groups = SampledGroups.gather(
        prompts,
        GROUP,
        own,
        prompt_shard=ranks.at.prompt_shard,
        component_names=("exact", "format"),
        sum_over_ranks=transfer.collectives.sum,
    )
    whole = SampledGroups.of(rollouts, GROUP)
    for name in ("reward", "completion_tokens", "loss_tokens", "step_ends", "step_offsets", "has_steps", "has_experts"):
        np.testing.assert_array_equal(getattr(groups.table, name), getattr(whole.table, name))
    assert groups.table.prompt_shard.tolist() == shard_of
    assert np.isnan(groups.table.components[:, 1]).all()

    trainer = np.array([(5 * i + 1) % topology.dp for i in range(len(rollouts))])
    found = transfer.to_trainers(groups.tokens, groups.table, trainer)
    expected = whole.tokens.select(trainer == ranks.at.dp_rank)
    for name in RolloutTokens.__dataclass_fields__:
        wanted, received = getattr(expected, name), getattr(found, name)
        assert (wanted is None) == (received is None) == (name == "expert_choices" and not with_experts)
        if wanted is not None:
            np.testing.assert_array_equal(received, wanted, name)
            assert received.dtype == wanted.dtype

    known = np.where(np.arange(len(rollouts)) < 9, trainer, -1)  # as with two minibatches
    numbers = found.select(found.ids < 9).on_loss_tokens(found.select(found.ids < 9).token_ids.astype(np.float32))
    has_them = rank == topology.loss_rank(ranks.at.dp_rank)
    back = transfer.to_samplers(numbers if has_them else None, groups.table, known)
    sampled = groups.tokens.select(groups.tokens.ids < 9)
    assert back.ids.tolist() == sampled.ids.tolist()
    assert back.values.tolist() == sampled.token_ids[sampled.loss_mask].astype(float).tolist()

    positions = found.on_loss_tokens(found.loss_mask)
    of_loss_rank = positions.with_values(np.full(len(positions.values), float(rank), np.float32))
    shared = transfer.in_replica(of_loss_rank if has_them else None, positions)
    assert set(shared.values.tolist()) <= {float(topology.loss_rank(ranks.at.dp_rank))}
    per_rollout = transfer.sum_per_rollout(found.ids * 2.0, found.ids, len(rollouts))
    assert per_rollout.tolist() == [2.0 * i for i in range(len(rollouts))]
    gathered = transfer.collectives.gather_losses(np.array([float(ranks.at.dp_rank)]))
    assert gathered[:, 0].tolist() == list(range(topology.dp))


@pytest.mark.parametrize("topology", LAYOUTS, ids=lambda t: f"{t.world_size}tp{t.tp}pp{t.pp}cp{t.cp}e{t.engine_tp}")
def test_every_rank_gets_what_it_trains_and_every_sampler_gets_its_numbers(
    laboratory: Laboratory, topology: Topology
) -> None:
    laboratory.pool.call(topology.world_size, transfer_with_and_without_experts, topology)


def transfer_with_and_without_experts(rank: int, topology: Topology) -> None:
    for with_experts in (False, True):
        transfer_there_and_back(rank, topology, with_experts)
