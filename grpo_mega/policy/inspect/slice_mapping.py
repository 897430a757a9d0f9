"""The slices of Hugging Face tensors that every rank of a layout holds, from Megatron's modules without weights.

The modules of each pipeline stage are built on the meta device in a fake process group, so hundreds of ranks take
seconds. The slices come from `MegatronWeights`, which also loads, saves and syncs.
Asserted by tests/e2e/test_check_mapping.py for DeepSeek-V3 on 512 ranks.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from grpo_mega.config.policy_sections import ParallelConfig, PrecisionConfig
from grpo_mega.interfaces import HeldSlice
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.parallel.topology import Topology
from grpo_mega.policy.build import init_groups
from grpo_mega.policy.megatron_patches import cpu
from grpo_mega.policy.module_choice import ModuleChoice
from grpo_mega.policy.transformer_config import bare_models, transformer_config
from grpo_mega.policy.weight_source import MegatronWeights, weight_copies
from grpo_mega.types import TensorSlice


def held_by_ranks(
    spec: ModelSpec, parallel: ParallelConfig, topology: Topology, modules: ModuleChoice
) -> Iterator[tuple[int, HeldSlice]]:
    """Yield (rank, counted slice) over the ranks of one copy of the model.

    Call it in a process without process groups.
    """
    meta = torch.device("meta")
    copy = weight_copies(topology)[0]
    size = len(copy) // topology.pp
    for stage in (copy[i : i + size] for i in range(0, len(copy), size)):
        dist.init_process_group("fake", rank=stage[0], world_size=topology.world_size, store=FakeStore())
        try:
            world_group = dist.group.WORLD
            assert world_group is not None, "init_process_group was called above"
            with cpu.without_gpu(meta), meta:
                init_groups(Ranks(topology, topology.coordinates(stage[0]), meta), 60)
                config = transformer_config(spec, parallel, PrecisionConfig(dtype="bf16"), modules.on_meta)
                models = bare_models(spec, config, parallel)
            for rank in stage:  # all ranks of a stage have the same modules
                ranks = Ranks(topology, topology.coordinates(rank), meta)
                weights = MegatronWeights(models, spec, ranks, world_group, lambda: None)
                yield from ((rank, held) for held in weights.shards() if held.counted)
        finally:
            dist.destroy_process_group()


def faults_of_mapping(shapes: Mapping[str, tuple[int, ...]], held: Iterable[tuple[int, HeldSlice]]) -> list[str]:
    """Return why the slices do not cover every element of every tensor exactly once; an empty list if they do."""
    slices: dict[str, list[tuple[int, TensorSlice]]] = defaultdict(list)
    faults: list[str] = []
    for rank, each in held:
        slices[each.hf.name].append((rank, each.hf))
        if tuple(each.view.shape) != each.hf.shape:
            faults.append(f"{each.hf} is a region of shape {tuple(each.view.shape)} of a parameter on rank {rank}")
    faults += [
        f"{name} of no tensor of the checkpoint is on rank {slices[name][0][0]}" for name in slices.keys() - shapes
    ]
    for name, shape in shapes.items():
        covered = sum(math.prod(part.shape) for _, part in slices[name])
        if covered != math.prod(shape):
            faults.append(f"{name} of shape {shape} has {math.prod(shape)} elements, ranks hold {covered}")
        faults += [f"{a} on rank {i} and {b} on rank {j} overlap" for i, a, j, b in _overlaps(slices[name])]
        inside = all(
            o + n <= size
            for _, part in slices[name]
            for o, n, size in zip(part.offsets, part.shape, shape, strict=True)
        )
        if not inside:
            faults.append(f"{name} of shape {shape} is smaller than what ranks hold of it")
    return faults


def _overlaps(slices: list[tuple[int, TensorSlice]]) -> Iterator[tuple[int, TensorSlice, int, TensorSlice]]:
    """Yield overlapping pairs. Slices of one tensor are split along one axis, so neighbors by offset are compared."""
    ordered = sorted(slices, key=lambda item: item[1].offsets)
    for (i, a), (j, b) in itertools.pairwise(ordered):
        if all(
            max(x, y) < min(x + m, y + n) for x, m, y, n in zip(a.offsets, a.shape, b.offsets, b.shape, strict=True)
        ):
            yield i, a, j, b
