"""Rectangles of a flat range: they partition it in order, and there are few of them."""

from __future__ import annotations

import gc
import inspect
import math
import sys
from unittest import mock

import pytest
import torch

from grpo_mega.policy.megatron_patches import optimizer_state
from grpo_mega.policy.megatron_patches.optimizer_state import rectangles

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # isort: skip - after megatron_patches


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (1, 5), (5, 1), (2, 3, 4), (3, 1, 2, 2)])
def test_rectangles_partition_every_range_in_order(shape: tuple[int, ...]) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    for start in range(whole.numel() + 1):
        for end in range(start, whole.numel() + 1):
            found = list(rectangles(start, end, shape))
            values = [
                whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].flatten()
                for offsets, sizes in found
            ]
            assert torch.cat([*values, torch.empty(0, dtype=torch.int64)]).tolist() == list(range(start, end))
            assert len(found) <= max(1, 2 * len(shape) - 1)
            assert all(0 not in sizes for _, sizes in found)


def test_a_range_of_a_matrix_is_part_of_a_row_whole_rows_and_part_of_a_row() -> None:
    assert list(rectangles(3, 14, (4, 4))) == [((0, 3), (1, 1)), ((1, 0), (2, 4)), ((3, 0), (1, 2))]
    assert list(rectangles(5, 7, (4, 4))) == [((1, 1), (1, 2))]
    assert list(rectangles(0, 16, (4, 4))) == [((0, 0), (4, 4))]


def test_pieces_of_one_memory_are_joined_without_a_copy() -> None:
    flat = torch.arange(24.0)
    pieces = [flat[:3].view(1, 3), flat[3:15].view(4, 3), flat[15:]]
    joined = optimizer_state._joined(pieces)
    assert torch.equal(joined, flat)
    assert joined.data_ptr() == flat.data_ptr()
    for other in (
        [pieces[0], pieces[2]],
        [pieces[1], pieces[0]],
        [pieces[0], pieces[1].clone()],
        [flat.view(4, 6)[:, :3], flat[15:]],
    ):
        assert torch.equal(optimizer_state._joined(other), torch.cat([piece.flatten() for piece in other]))


def test_a_save_does_not_collect_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    collected = mock.Mock()
    monkeypatch.setattr(gc, "collect", collected)
    optimizer_state.install()
    assert "gc.collect()" in inspect.getsource(DistributedOptimizer.sharded_state_dict)  # the patch is still needed
    vars(sys.modules[DistributedOptimizer.__module__])["gc"].collect()
    assert not collected.called


class AdamWithoutState(torch.optim.SGD):
    """An optimizer before its first step, as Transformer Engine's Adam with moments in bf16."""


def test_before_the_first_step_the_main_parameter_of_bf16_moments_is_the_parameter() -> None:
    """The real method, of Megatron, finds no main parameter then."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.5], dtype=torch.bfloat16))
    optimizer = mock.Mock(
        config=mock.Mock(use_precision_aware_optimizer_no_fp8_or_ds_fp8=True),
        optimizer=AdamWithoutState([parameter], lr=0.1),
        model_param_group_index_map={parameter: (0, 0)},
    )
    optimizer._get_main_param_and_optimizer_states = lambda each: (
        DistributedOptimizer._get_main_param_and_optimizer_states(optimizer, each)
    )
    with pytest.raises(KeyError, match="master_param"):
        optimizer._get_main_param_and_optimizer_states(parameter)
    optimizer.optimizer.state.clear()
    states = optimizer_state._states_of(optimizer, parameter)
    assert states.keys() == {"param"}
    assert states["param"].dtype == torch.float32
    assert states["param"].tolist() == [1.0, -2.5]
    assert not optimizer.optimizer.state
