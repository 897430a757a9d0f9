"""Parameter sizes of the policy's modules, counted from the modules on the meta device, without allocating memory.

A fake process group is created, and in it the smallest model that has every kind of layer of the real model. Local
modules are counted on every machine: those of Transformer Engine have the same parameters under other names.
Asserted by tests/unit/policy/inspect/test_module_sizes.py, against the modules of whole models, and by
tests/unit/policy/test_transformer_engine_modules.py: nothing is allocated on a GPU.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from grpo_mega.config.policy_sections import ParallelConfig, PrecisionConfig
from grpo_mega.models.module_sizes import ModuleCounter, ModuleSizes, ParameterSize
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.parallel.topology import Topology
from grpo_mega.policy.build import init_groups
from grpo_mega.policy.megatron_patches import cpu
from grpo_mega.policy.module_choice import LOCAL_ON_META, ModuleChoice
from grpo_mega.policy.modules.policy_model import PolicyModel
from grpo_mega.policy.transformer_config import build_models, transformer_config

from megatron.core import parallel_state  # isort: skip - after policy.build, which prepares the import


def module_counter(spec: ModelSpec, megatron: Mapping[str, Any] = MappingProxyType({})) -> ModuleCounter:
    """Return the `ModuleCounter` of this model. `megatron` is the config's `parallel.megatron`."""
    return functools.partial(module_sizes, spec, json.dumps(dict(megatron)))


@functools.lru_cache(maxsize=256)
def module_sizes(spec: ModelSpec, megatron: str = "{}", *, tp: int, ep: int, etp: int) -> ModuleSizes:
    """Return the parameter sizes of one rank; they are the same on all ranks of the dense and the expert grid.

    Args:
        spec: the model.
        megatron: `parallel.megatron` as JSON, which is hashable.
        tp: tensor-parallel size of the dense layers.
        ep: expert-parallel size.
        etp: tensor-parallel size of the experts.

    Raises:
        AssertionError: this process is a rank of a job.
        UserError: a field of `parallel.megatron` is not accepted.
    """
    sample, dense, experts = _sample(spec)
    parallel = ParallelConfig(tp=tp, ep=ep, etp=etp, sequence_parallel=tp > 1, megatron=json.loads(megatron))
    (model,) = meta_models(sample, parallel, math.lcm(tp, ep * etp), 0, LOCAL_ON_META)
    found: dict[str, list[ParameterSize]] = {}
    for name, parameter in model.named_parameters():
        part, name = _part(name)
        is_expert = not getattr(parameter, "allreduce", True)
        found.setdefault(part, []).append(ParameterSize(name, tuple(parameter.shape), is_expert))
    layers = {kind: tuple(found[f"layer {i}"]) for i, kind in enumerate(dense + experts)}
    return ModuleSizes(
        embedding=tuple(found["embedding"]),
        dense_layer=layers.get("dense", ()),
        moe_layer=layers.get("moe", ()),
        final_norm=tuple(found["norm"]),
        head=tuple(found.get("head", ())),
    )


def meta_models(
    spec: ModelSpec, parallel: ParallelConfig, world_size: int, rank: int, modules: ModuleChoice
) -> list[PolicyModel]:
    """Build the model chunks of one rank of a job on the meta device."""
    axes = parallel
    topology = Topology(
        world_size, tp=axes.tp, pp=axes.pp, cp=axes.cp, ep=axes.ep, etp=axes.etp, vpp=axes.vpp
    )  # fmt: skip
    ranks = Ranks(topology, topology.coordinates(rank), torch.device("meta"))
    with cpu.without_gpu(ranks.device), _fake_group(ranks), ranks.device:
        config = transformer_config(spec, parallel, PrecisionConfig(dtype="bf16"), modules.on_meta)
        config.perform_initialization = False  # saves seconds: random numbers are not needed
        return build_models(spec, config, parallel, ranks)


def _sample(spec: ModelSpec) -> tuple[ModelSpec, list[str], list[str]]:
    """Return a model with one layer of each kind, and the dense and expert kinds."""
    if spec.moe is None:
        return replace(spec, num_layers=1), ["dense"], []
    dense, experts = [["dense"], []][all(spec.moe.layers)], ["moe"]
    layers = (False,) * len(dense) + (True,)
    return replace(spec, num_layers=len(layers), moe=replace(spec.moe, layers=layers)), dense, experts


def _part(name: str) -> tuple[str, str]:
    """Return (part, name in the part): `decoder.layers.0.mlp.x` -> (layer 0, mlp.x)."""
    if name.startswith("decoder.layers."):
        _, _, layer, rest = name.split(".", 3)
        return f"layer {layer}", rest
    return {"embedding": "embedding", "decoder": "norm", "output_layer": "head"}[name.split(".")[0]], name


@contextmanager
def _fake_group(ranks: Ranks) -> Iterator[None]:
    """Create Megatron's process groups for one rank of a job, in a fake process group."""
    # registers the backend "fake"
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "the process must not be a rank of a job"
    dist.init_process_group("fake", store=FakeStore(), rank=ranks.rank, world_size=ranks.topology.world_size)
    try:
        init_groups(ranks, 60.0)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
