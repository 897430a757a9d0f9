"""Memory of an engine on one rank: its weights, its KV cache and its workspace.

Pure arithmetic. Asserted by tests/unit/planner/test_phase_memory.py and tests/engine/test_vllm_record.py.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from grpo_mega.models.kv_cache_memory import kv_bytes_per_token
from grpo_mega.models.parameter_tables import hf_shapes
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.topology import Topology
from grpo_mega.planner.inputs import PlanInputs
from grpo_mega.quantization.fp8_checkpoint import is_quantized, scales_shape

SCALE_BYTES = 4
"""Bytes of the scale of one block of FP8 values."""

# Weights that every rank of an engine holds whole.
_ROUTERS_AND_LATENTS = (
    ".mlp.gate.weight",
    ".block_sparse_moe.gate.weight",
    ".router.weight",
    "_a_proj.weight",
    "_a_proj_with_mqa.weight",
)


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of an engine on one rank."""

    weights: float
    kv_cache: float
    kv_bytes_per_token: float
    workspace: float
    """CUDA graphs, the workspaces of kernels, logits of one decode step and hidden states of one prefill step."""

    @classmethod
    def from_inputs(cls, inputs: PlanInputs) -> EngineMemory:
        """Return the memory of the engine of this run.

        Raises:
            UserError: `engine.kv_cache_tokens` does not hold one rollout of full length.
        """
        engine, spec = inputs.config.engine, inputs.spec
        weights = engine_weight_bytes(
            spec, inputs.topology, inputs.itemsize, spread=engine.ep > 1, fp8=engine.fp8 is not None
        )
        hidden_states = 6.0 * inputs.kv_cache.batched_tokens * spec.hidden_size * 2
        logits = 8.0 * engine.max_num_seqs * spec.vocab_size  # logits and probabilities in float32
        return cls(
            weights=weights,
            kv_cache=_kv_cache_bytes(inputs, weights),
            kv_bytes_per_token=kv_bytes_per_token(spec, engine.tp, inputs.itemsize),
            workspace=inputs.assumptions.engine_workspace + logits + hidden_states,
        )


def _kv_cache_bytes(inputs: PlanInputs, weights: float) -> float:
    """Return the bytes of the KV cache: those that the engine requests, or what its share of the GPU leaves.

    Raises:
        UserError: `engine.kv_cache_tokens` does not hold one rollout of full length.
    """
    if inputs.config.engine.kv_cache_tokens is not None or inputs.is_cpu_job:
        return inputs.kv_cache.num_bytes(inputs.spec, inputs.config.engine.tp, inputs.itemsize)
    assumed = inputs.assumptions
    return max(0.0, assumed.engine_share * inputs.gpu.memory - weights - assumed.engine_workspace)


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
