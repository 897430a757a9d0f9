"""What vLLM 0.32 computes wrongly or lacks on CPU, put right in this process. Each part can go when vLLM does it.

- Experts spread over the ranks of an engine: the kernel (csrc/cpu/cpu_fused_moe.cpp) indexes the experts of this rank
  with the ids of the whole model and reads beyond the last one: wrong numbers or a segmentation fault.
  `CPUUnquantizedExperts.apply` (layers/fused_moe/experts/cpu_moe.py) is given the map between them and drops it.
- Rotary positions of latent attention: layers/mla.py:228 gives a query [T, N, D], and `rotary_embedding` of
  csrc/cpu/pos_encoding.cpp counts its rows as T * N tokens with one head each: every head after the first token's first
  is turned by another token's position, or by what lies behind the positions in memory.
- Experts shared by data-parallel ranks: the tokens of all are gathered, and what each rank computes of them is added up
  and given back (device_communicators/all2all.py, AgRsAll2AllManager), by collectives of unequal numbers of rows. The
  communicator for CPUs has none.
- Experts' numbers gathered over tp (layers/fused_moe/routed_experts_capturer.py, where each rank routes its part of the
  tokens): `shm_all_gather` takes no int32.
Asserted by tests/engine/test_weight_sync.py and test_vllm_dp.py; the last by tests/e2e/test_routing_replay.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def correct_vllm() -> None:
    """Once; later calls do nothing."""
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
        _CPUSHMDistributed.all_gather_into_tensor = _of_integers(_CPUSHMDistributed.all_gather_into_tensor)


def own_experts(weights: Tensor, ids: Tensor, expert_map: Tensor) -> tuple[Tensor, Tensor]:
    """The picks of a router as one rank computes them; the sum over ranks is the layer's output.

    Args:
        weights: [T, K] of the picked experts.
        ids: [T, K] of the picked experts in the model.
        expert_map: [E] number on this rank, -1 where another rank has the expert.

    Returns:
        Weights that are zero for the experts of other ranks, and numbers on this rank (any valid one for those).
    """
    local = expert_map[ids.long()]
    return weights * (local >= 0), local.clamp(min=0).to(ids.dtype)


def _with_own_experts(apply: Any) -> Any:
    @functools.wraps(apply)
    def mapped(self: Any, *, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None, **rest: Any) -> None:
        if expert_map is not None:
            # With weights on the input the kernel would add other ranks' experts unweighted.
            assert not rest["apply_router_weight_on_input"], "weights on the input and experts spread over ranks"
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


def _of_integers(gather: Any) -> Any:
    @functools.wraps(gather)
    def gathered(self: Any, output: Tensor, input: Tensor, group: Any = None) -> None:
        if input.dtype == torch.int32:  # the same bits, which are only moved
            output, input = output.view(torch.float32), input.view(torch.float32)
        gather(self, output, input, group)

    return gathered


def gathered_rows(rows: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """[sum(sizes), ...]: the rows of all ranks of a group, first to last; `sizes` has their numbers."""
    longest = max(sizes)  # gloo gathers equal numbers only
    mine = rows.new_zeros(longest, *rows.shape[1:])
    mine[: rows.shape[0]] = rows
    heard = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(heard, mine, group=group)
    return torch.cat([each[:size] for each, size in zip(heard, sizes, strict=True)])


def own_rows_of_sum(rows: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """[sizes[rank], ...]: this rank's rows of the sum of `rows` [sum(sizes), ...] over a group."""
    total = rows.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total.narrow(0, sum(sizes[: dist.get_rank(group)]), sizes[dist.get_rank(group)])


def _all_gatherv(self: Any, input_: list[Tensor], dim: int, sizes: list[int]) -> list[Tensor]:
    assert dim == 0, f"dim={dim}"
    return [gathered_rows(rows, sizes, self.device_group) for rows in input_]


def _reduce_scatterv(self: Any, input_: Tensor, dim: int, sizes: list[int]) -> Tensor:
    assert dim == 0, f"dim={dim}"
    return own_rows_of_sum(input_, sizes, self.device_group)
