"""Memory of the engine of a plan on one rank: its weights, its KV cache and its workspace.

Pure arithmetic. Asserted by tests/unit/planner/test_phase_memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo_mega.models.engine_memory import check_memory_share, engine_weight_bytes, step_buffer_bytes
from grpo_mega.models.kv_cache_memory import kv_bytes_per_token
from grpo_mega.planner.inputs import PlanInputs


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
        """Return the memory of the engine of this run; nothing without an engine.

        Raises:
            UserError: `engine.kv_cache_tokens` or `engine.memory_share` does not hold one rollout of full length.
        """
        config, spec, size = inputs.config, inputs.spec, inputs.kv_cache
        per_token = kv_bytes_per_token(spec, config.engine.tp, inputs.itemsize)
        if not config.has_engine:
            return cls(0.0, 0.0, per_token, 0.0)
        if inputs.is_cpu_job:
            weights = engine_weight_bytes(spec, inputs.topology, inputs.itemsize, spread=config.engine.ep > 1)
            cached = size.num_bytes(spec, config.engine.tp, inputs.itemsize)
            return cls(weights, cached, per_token, step_buffer_bytes(size, spec))
        share = check_memory_share(config, spec, inputs.topology, inputs.gpu.memory)
        kv_cache = share.kv_cache
        if config.engine.kv_cache_tokens is not None:
            kv_cache = size.num_bytes(spec, config.engine.tp, inputs.itemsize)
        return cls(share.weights, kv_cache, per_token, share.workspace)
