"""Memory of an engine on one rank: weights, workspace, and the KV cache that its share of a GPU leaves.

The planner, the doctor and the engines take these numbers from here, so they accept and reject the same configs. Pure
arithmetic. Asserted by tests/unit/models/test_engine_memory.py, tests/unit/planner/test_phase_memory.py and
tests/engine/test_vllm_record.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grpo_mega.config.schema import Config
from grpo_mega.models.fp8_tensors import SCALE_BYTES, is_quantized, scales_shape
from grpo_mega.models.kv_cache_memory import KvCacheSize, kv_bytes_per_token
from grpo_mega.models.parameter_tables import hf_shapes
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.topology import Topology
from grpo_mega.types import UserError

GIB = 2**30
ITEMSIZE = {"fp32": 4, "bf16": 2}
"""Bytes of one element for each `precision.dtype`."""

ENGINE_GRAPHS = 1.0 * GIB
"""CUDA graphs of an engine: an assumption (docs/measurements/planner.md)."""
ENGINE_KERNELS = 1.0 * GIB
"""Loaded kernels and their buffers, beside weights, KV cache and graphs: an assumption (as above)."""

# The arguments with which an engine captures no CUDA graphs.
_NO_GRAPHS = {"vllm": "enforce_eager", "sglang": "disable_cuda_graph"}

# Weights that every rank of an engine holds whole.
_ROUTERS_AND_LATENTS = (
    ".mlp.gate.weight",
    ".block_sparse_moe.gate.weight",
    ".router.weight",
    "_a_proj.weight",
    "_a_proj_with_mqa.weight",
)


@dataclass(frozen=True)
class SleepMode:
    """Memory that an engine frees while it sleeps, beside weights, KV cache and the workspaces of its kernels."""

    offloads_graphs: bool
    """CUDA graphs are copied to the host."""
    suspends_communicators: bool
    """NCCL communicators free their buffers."""


SLEEP_MODES = {
    "vllm": SleepMode(offloads_graphs=True, suspends_communicators=True),  # engines/vllm/arguments.py sets both
    "sglang": SleepMode(offloads_graphs=False, suspends_communicators=False),  # 0.5.23 suspends no communicator
}
"""The mode of each `engine.kind` on CUDA."""


@dataclass(frozen=True)
class EngineShare:
    """The parts of `engine.memory_share` on one GPU, in bytes.

    Both engines count the workspace in the share: vLLM profiles it, and the SGLang adapter subtracts it.
    """

    limit: float
    """`engine.memory_share` times the memory of the GPU."""
    weights: float
    workspace: float

    @classmethod
    def of(cls, config: Config, spec: ModelSpec, topology: Topology, gpu_bytes: float) -> EngineShare:
        """Return the parts of the share on a GPU with `gpu_bytes` of memory."""
        weights = engine_weight_bytes(
            spec,
            topology,
            ITEMSIZE[config.precision.dtype],
            spread=config.engine.ep > 1,
            fp8=config.engine.fp8 is not None,
        )
        workspace = workspace_bytes(
            KvCacheSize.from_config(config), spec, graph_bytes(config.engine.kind, config.engine.args)
        )
        return cls(config.engine.memory_share * gpu_bytes, weights, workspace)

    @property
    def kv_cache(self) -> float:
        """Bytes that are left for the KV cache; 0 if weights and workspace take more than the share."""
        return max(0.0, self.limit - self.weights - self.workspace)


def step_buffer_bytes(size: KvCacheSize, spec: ModelSpec) -> float:
    """Return the bytes of the logits of one decode step and of the hidden states of one prefill step."""
    hidden_states = 6.0 * size.batched_tokens * spec.hidden_size * 2
    logits = 8.0 * size.max_num_seqs * spec.vocab_size  # logits and probabilities in float32
    return hidden_states + logits


def graph_bytes(kind: str, args: Mapping[str, Any]) -> float:
    """Return the bytes of an engine's CUDA graphs on one GPU; 0 if `engine.args` turns them off."""
    return 0.0 if args.get(_NO_GRAPHS[kind]) else ENGINE_GRAPHS


def workspace_bytes(size: KvCacheSize, spec: ModelSpec, graphs: float) -> float:
    """Return the bytes that an engine needs on one GPU beside weights and KV cache.

    Args:
        size: of the KV cache; gives the tokens and rollouts of a step.
        spec: the model.
        graphs: bytes of CUDA graphs.
    """
    return graphs + ENGINE_KERNELS + step_buffer_bytes(size, spec)


def check_memory_share(config: Config, spec: ModelSpec, topology: Topology, gpu_bytes: float) -> EngineShare:
    """Check that `engine.memory_share` holds the engine's weights, its workspace and one rollout of full length.

    The planner, the doctor and the start of a job all call this function. With `engine.kv_cache_tokens` the engine
    allocates what that key says, whatever the share is.

    Args:
        config: the run.
        spec: its model.
        topology: gives the engine's tp and dp.
        gpu_bytes: memory of one GPU.

    Raises:
        UserError: the share is too small; the remedy is the least share, or more ranks if no share is enough.
    """
    share, size = EngineShare.of(config, spec, topology, gpu_bytes), KvCacheSize.from_config(config)
    per_token = kv_bytes_per_token(spec, config.engine.tp, ITEMSIZE[config.precision.dtype])
    block_bytes = size.format.block_tokens * per_token
    one_rollout = (size.blocks_per_rollout + size.format.padding_blocks) * block_bytes
    if config.engine.kv_cache_tokens is not None or share.kv_cache >= one_rollout:
        return share
    fitting = max(0, int(share.kv_cache / block_bytes) - size.format.padding_blocks) * size.format.block_tokens
    least = math.ceil(100 * (share.weights + share.workspace + one_rollout) / gpu_bytes) / 100
    split = f"split the engine over more ranks (engine.tp={config.engine.tp})"
    raise UserError(
        f"engine.memory_share={config.engine.memory_share:g} is {share.limit / GIB:.1f} of {gpu_bytes / GIB:.1f} GiB. "
        f"Weights take {share.weights / GIB:.1f} GiB and the workspace takes {share.workspace / GIB:.1f} GiB, so "
        f"{fitting} tokens fit in the KV cache; one rollout of {size.max_model_len} tokens "
        f"needs {one_rollout / GIB:.2f} GiB",
        remedy=f"use at least engine.memory_share={least:g}, or {split}" if least <= 1 else split,
    )


def engine_weight_bytes(
    spec: ModelSpec, topology: Topology, itemsize: int, *, spread: bool, fp8: bool = False
) -> float:
    """Return the bytes of an engine's weights on one rank.

    Experts are divided over all ranks of the engine, other matrices over tp. Norms, routers and latent projections are
    not divided. KV heads are repeated where there are fewer than ranks.

    Args:
        spec: the model.
        topology: gives the engine's tp and dp.
        itemsize: bytes of an element in the compute precision.
        spread: each expert is whole on one rank.
        fp8: matrices are stored as FP8 values, with scales.
    """
    sizes, tp = _engine_sizes(spec, itemsize, fp8), topology.engine_tp
    shared: float = sizes.shared
    # With whole experts and several copies of the attention, a rank computes its own tokens only. In models with latent
    # attention it then needs the whole shared expert (models/deepseek_v2.py of vLLM).
    if spec.mla is None or topology.engine_dp == 1 or not spread:
        shared /= tp
    dense = sizes.divided / tp + sizes.repeated + sizes.keys_and_values / min(tp, spec.num_kv_heads)
    return dense + shared + sizes.experts / topology.engine_size


@dataclass
class _EngineSizes:
    """Bytes of the whole model, by the way an engine divides them."""

    experts: int = 0
    shared: int = 0
    """Shared experts."""
    divided: int = 0
    """Matrices that are divided over tp."""
    repeated: int = 0
    """Weights that every rank holds whole."""
    keys_and_values: int = 0
    """Projections that are divided over KV heads."""


@functools.lru_cache(maxsize=16)
def _engine_sizes(spec: ModelSpec, itemsize: int, fp8: bool) -> _EngineSizes:
    sizes = _EngineSizes()
    for name, shape in hf_shapes(spec).items():
        plain = size = itemsize * math.prod(shape)
        if fp8 and is_quantized(name, shape):
            size = math.prod(shape) + SCALE_BYTES * math.prod(scales_shape(shape))
        if ".experts." in name:
            sizes.experts += size
        elif ".shared_expert" in name:
            sizes.shared += size
        elif len(shape) == 1 or name.endswith(_ROUTERS_AND_LATENTS):
            sizes.repeated += size
        elif spec.mla is None and name.endswith((".k_proj.weight", ".v_proj.weight")):
            sizes.keys_and_values += size
        else:  # the last projection of latent attention is kept beside its absorbed form
            sizes.divided += size + (plain if name.endswith(".kv_b_proj.weight") else 0)
    return sizes
