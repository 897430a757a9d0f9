"""Which modules `parallel.recompute=selective` recomputes; the policy and the planner both ask here.

Asserted by tests/unit/models/test_recompute.py.
"""

from __future__ import annotations

from grpo_mega.config.policy_sections import ParallelConfig
from grpo_mega.models.spec import ModelSpec


def recomputed_modules(spec: ModelSpec, parallel: ParallelConfig, *, fused_attention: bool) -> tuple[str, ...]:
    """Return Megatron's names of the recomputed modules; empty unless `parallel.recompute` is selective.

    A fused attention kernel recomputes the scores in its own backward pass and keeps only its inputs, its output and
    one number per token and head. Recomputing the core on top saves this number and costs a whole forward pass of the
    kernel. What remains cheap for its size are the up-projections of latent attention.

    Args:
        spec: the model.
        parallel: config section; `recompute_modules` takes precedence.
        fused_attention: True where attention is one kernel: Transformer Engine's, or torch's on CUDA.
    """
    if parallel.recompute != "selective":
        return ()
    if parallel.recompute_modules is not None:
        return parallel.recompute_modules
    if not fused_attention:
        return ("core_attn",)
    return ("mla_up_proj",) if spec.mla is not None else ()
