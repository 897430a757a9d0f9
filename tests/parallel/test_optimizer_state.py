"""A checkpoint of the optimizer needs no memory beside the state: no rank gathers what another rank holds."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from grpo_mega.observe.run_folder import RunFolder
from tests.helpers.checkpointed_training import RATES, resume_training, run_with_checkpoint, train_on
from tests.helpers.recorded_rollouts import Layout, Recorded, open_policy, torch_optimizers
from tests.parallel.conftest import Laboratory


@dataclass(frozen=True)
class Staged:
    """Bytes of one rank: of its part of the optimizer state, of what it would save, of copies of it, and gathered."""

    held: int
    saved: int
    copied: int
    gathered: int


def staged_by_a_save(rank: int, recorded: Recorded, layout: Layout, upstream: bool) -> Staged:
    """Build what a save writes, with this program's conversion or with that of the installed Megatron-Core."""
    from grpo_mega.policy import sharded_state
    from grpo_mega.policy.megatron_patches.optimizer_state import DistributedOptimizer, ShardedTensor, nested_values

    policy = open_policy(rank, recorded, layout)
    train_on(rank, policy, recorded, layout, RATES[:1])
    held = [
        tensor
        for adam in torch_optimizers(policy)
        for parameter in (p for group in adam.param_groups for p in group["params"])
        for tensor in (parameter, adam.state[parameter]["exp_avg"], adam.state[parameter]["exp_avg_sq"])
    ]
    addresses = {tensor.untyped_storage().data_ptr() for tensor in held}
    gathered = 0
    gather = dist.all_gather

    def counting(received: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        nonlocal gathered
        gathered += sum(each.nbytes for each in received)
        return gather(received, *args, **kwargs)

    name = "sharded_param_state_fully_reshardable"
    method = inspect.unwrap(getattr(DistributedOptimizer, name)) if upstream else getattr(DistributedOptimizer, name)
    with mock.patch.object(dist, "all_gather", counting), mock.patch.object(DistributedOptimizer, name, method):
        state = sharded_state._sharded_state(policy.parts, is_loading=False)["optimizer"]
    tensors = [each for each in nested_values(state) if isinstance(each, ShardedTensor)]
    copies = [each.data.nbytes for each in tensors if each.data.untyped_storage().data_ptr() not in addresses]
    return Staged(sum(each.nbytes for each in held), sum(each.data.nbytes for each in tensors), sum(copies), gathered)


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("model", "layout"),
    [("qwen3-tied", Layout(4, tp=2, pp=2)), ("qwen3", Layout(2)), ("qwen3", Layout(4, tp=2))],
    ids=str,
)
def test_a_save_gathers_and_copies_nothing(laboratory: Laboratory, model: str, layout: Layout, dtype: str) -> None:
    recorded = replace(laboratory.recorded(model), dtype=dtype)
    for staged in laboratory.pool.call(layout.world, staged_by_a_save, recorded, layout, False):
        assert staged == Staged(held=staged.held, saved=staged.held, copied=0, gathered=0)


def test_megatron_alone_would_gather_the_state_of_all_ranks_on_each(laboratory: Laboratory) -> None:
    """A failure means that the release repaired it: delete megatron_patches/optimizer_state.py."""
    for staged in laboratory.pool.call(2, staged_by_a_save, laboratory.recorded("qwen3"), Layout(2), True):
        assert staged.gathered >= 2 * staged.held


def run_with_upstream_checkpoint(rank: int, recorded: Recorded, layout: Layout, folder: Path) -> list[bytes]:
    """Return the state at the end of a run whose checkpoint holds whole parameters, as Megatron-Core alone writes."""
    from grpo_mega.policy.megatron_patches.optimizer_state import DistributedOptimizer

    name = "sharded_param_state_fully_reshardable"
    with mock.patch.object(DistributedOptimizer, name, inspect.unwrap(getattr(DistributedOptimizer, name))):
        return run_with_checkpoint(rank, recorded, layout, folder)[1]


def test_a_checkpoint_of_whole_parameters_continues_to_the_same_state(laboratory: Laboratory, tmp_path: Path) -> None:
    recorded, layout = laboratory.recorded("qwen3"), Layout(2)
    whole = laboratory.pool.call(2, run_with_upstream_checkpoint, recorded, layout, RunFolder(tmp_path).checkpoints)
    (checkpoint,) = RunFolder(tmp_path).complete_checkpoints().values()
    resumed = laboratory.pool.call(2, resume_training, recorded, layout, checkpoint)
    assert [state for _, _, state in resumed] == whole
