"""Patches for vLLM 0.32 on CPU, applied in this process. Each one can be removed once vLLM fixes its defect.

- Expert parallelism: the kernel (csrc/cpu/cpu_fused_moe.cpp) indexes the experts of this rank with the ids of the whole
  model and reads beyond the last one, which gives wrong numbers or a segmentation fault. `CPUUnquantizedExperts.apply`
  (layers/fused_moe/experts/cpu_moe.py) receives the map between the ids and ignores it.
- Rotary positions of latent attention: layers/mla.py:228 passes a query [T, N, D], and `rotary_embedding` of
  csrc/cpu/pos_encoding.cpp counts its rows as T * N tokens with one head each. Every head after the first is rotated by
  another token's position, or by memory behind the positions.
- Experts shared by data-parallel ranks: the tokens of all ranks are gathered, and the partial results are summed and
  scattered (device_communicators/all2all.py, AgRsAll2AllManager) with unequal numbers of rows. The communicator for
  CPUs lacks these collectives.
- Expert ids gathered over tp (layers/fused_moe/routed_experts_capturer.py, where each rank routes a part of the
  tokens): `shm_all_gather` does not support int32.
Asserted by tests/engine/test_weight_sync.py and test_vllm_dp.py; the last by tests/e2e/test_routing_replay.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def patch_vllm() -> None:
    """Apply all patches. Later calls do nothing."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator, _CPUSHMDistributed
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    if not hasattr(CPUUnquantizedExperts.apply, "__wrapped__"):
        CPUUnquantizedExperts.apply = _with_own_experts(CPUUnquantizedExperts.apply)
    if not hasattr(RotaryEmbedding.forward_cpu, "__wrapped__"):
        RotaryEmbedding.forward_cpu = _with_heads(RotaryEmbedding.forward_cpu)
    if "all_gatherv" not in vars(CpuCommunicator):
        CpuCommunicator.all_gatherv = _all_gatherv
        CpuCommunicator.reduce_scatterv = _reduce_scatterv
    if not hasattr(_CPUSHMDistributed.all_gather_into_tensor, "__wrapped__"):
        _CPUSHMDistributed.all_gather_into_tensor = _with_int32(_CPUSHMDistributed.all_gather_into_tensor)


def own_experts(weights: Tensor, ids: Tensor, expert_map: Tensor) -> tuple[Tensor, Tensor]:
    """Restrict a router's choices to this rank's experts; the sum over ranks is the layer's output.

    Args:
        weights: [T, K] of the chosen experts.
        ids: [T, K] of the chosen experts, in the whole model.
        expert_map: [E] local index of each expert, -1 if another rank has it.

    Returns:
        Weights with zeros for experts of other ranks, and local indices (0 for experts of other ranks).
    """
    local = expert_map[ids.long()]
    return weights * (local >= 0), local.clamp(min=0).to(ids.dtype)


def _with_own_experts(apply: Any) -> Any:
    @functools.wraps(apply)
    def mapped(self: Any, *, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None, **rest: Any) -> None:
        if expert_map is not None:
            # With weights on the input the kernel would add other ranks' experts unweighted.
            assert not rest["apply_router_weight_on_input"], "router weights on the input with expert parallelism"
            topk_weights, topk_ids = own_experts(topk_weights, topk_ids, expert_map)
        apply(self, topk_weights=topk_weights, topk_ids=topk_ids, expert_map=expert_map, **rest)

    return mapped


def _with_heads(forward: Any) -> Any:
    @functools.wraps(forward)
    def by_head(self: Any, positions: Tensor, query: Tensor, key: Tensor | None = None) -> Any:
        if query.dim() == positions.dim() + 1:
            return forward(self, positions, query, key)
        return self.forward_native(positions, query, key)

    return by_head


def _with_int32(gather: Any) -> Any:
    @functools.wraps(gather)
    def gathered(self: Any, output: Tensor, input: Tensor, group: Any = None) -> None:
        if input.dtype == torch.int32:  # reinterpret the bits, which are only moved
            output, input = output.view(torch.float32), input.view(torch.float32)
        gather(self, output, input, group)

    return gathered


def gathered_rows(rows: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Return the rows [sum(sizes), ...] of all ranks of a group in rank order; `sizes` has their row counts."""
    longest = max(sizes)  # gloo gathers only equal sizes
    mine = rows.new_zeros(longest, *rows.shape[1:])
    mine[: rows.shape[0]] = rows
    received = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(received, mine, group=group)
    return torch.cat([each[:size] for each, size in zip(received, sizes, strict=True)])


def own_rows_of_sum(rows: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Return this rank's rows [sizes[rank], ...] of the sum of `rows` [sum(sizes), ...] over a group."""
    total = rows.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total.narrow(0, sum(sizes[: dist.get_rank(group)]), sizes[dist.get_rank(group)])


def _all_gatherv(self: Any, input_: list[Tensor], dim: int, sizes: list[int]) -> list[Tensor]:
    assert dim == 0, f"dim={dim}"
    return [gathered_rows(rows, sizes, self.device_group) for rows in input_]


def _reduce_scatterv(self: Any, input_: Tensor, dim: int, sizes: list[int]) -> Tensor:
    assert dim == 0, f"dim={dim}"
    return own_rows_of_sum(input_, sizes, self.device_group)
