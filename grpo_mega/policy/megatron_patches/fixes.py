"""Patches of defects in Megatron-Core 0.19, each with the upstream line. They apply on every machine.

Each patch has a test that fails once Megatron-Core no longer needs it: tests/parallel/test_patches_needed.py (pipeline
messages, latent attention, optimizer state) and tests/unit/policy/megatron_patches/test_fixes.py (the others).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from grpo_mega.models.parameter_tables import is_expert_parameter
from grpo_mega.models.spec import ModelSpec
from grpo_mega.policy.megatron_patches import checkpoint_writing, cpu, optimizer_state

cpu.prepare_import()

from megatron.core import parallel_state  # noqa: E402 - only after prepare_import
from megatron.core.optimizer import distrib_optimizer  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
from megatron.core.tensor_parallel import mappings  # noqa: E402
from megatron.core.transformer import multi_latent_attention  # noqa: E402
from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402

# Fields of TransformerConfig for pipeline messages. p2p_communication.py:17-51 posts send-previous, receive-previous,
# send-next, receive-next in one group. With two stages, previous and next are the same rank, and messages are matched
# in order: an interleaved schedule would receive a gradient as an activation.
PIPELINE_MESSAGES = {"batch_p2p_comm": False}
# Warnings on which a user cannot act: about the class that this project builds (docs/decisions/hybrid-model.md), about
# a layout that Megatron computes itself, and about asynchronous saves, which are also reported for a synchronous one.
_WARNINGS = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
}


def install() -> None:
    """Apply the patches that do not depend on a model. Idempotent."""
    for name in _WARNINGS:
        logging.getLogger(name).addFilter(_concerns_a_user)
    setter = DistributedOptimizer._set_main_param_and_optimizer_states
    if not getattr(setter, "keeps_own_step", False):
        DistributedOptimizer._set_main_param_and_optimizer_states = _with_own_step(setter)
    optimizer_state.install()
    checkpoint_writing.install()
    projection = QKNormConfigResolver._mla_fused_linear_or_default
    if not getattr(projection, "leaves_queries", False):
        QKNormConfigResolver._mla_fused_linear_or_default = _without_query_norm(projection)
    gather = multi_latent_attention.gather_from_tensor_model_parallel_region
    if not getattr(gather, "sums_shared_key", False):
        multi_latent_attention.gather_from_tensor_model_parallel_region = _summing_shared_key(gather)


def _concerns_a_user(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_WARNINGS[record.name])


def fit_to(spec: ModelSpec) -> None:
    """Set the number of experts that score a group of experts. Call it before a model is built.

    moe_utils.py:656 sums the topk // group_topk best experts of a group. DeepSeek-V2 uses the best one and DeepSeek-V3
    the best two, independent of these numbers.
    """
    if spec.moe is not None:
        moe_utils.group_limited_topk = functools.partial(_group_limited_topk, spec.moe.group_best)


def separate_experts(model: torch.nn.Module) -> None:
    """Mark expert parameters as reduced over the expert data-parallel group. Call it after a model is built.

    tensor_parallel/layers.py:961 marks them only where that group is not the one of the dense layers. With the mark in
    every layout, a checkpoint has the same optimizers in every layout: one of dense parameters and one of experts.
    """
    for name, parameter in model.named_parameters():
        if is_expert_parameter(name):
            parameter.allreduce = False  # type: ignore[attr-defined]


def keep_after_build(config: Any) -> None:
    """Switch off settings that finalize_model_grads.py misreads. Call it after all models are built."""
    if config.multi_latent_attention:
        # :453 treats the norms of latent vectors as per-head norms, and would sum gradients that are already complete
        config.qk_layernorm = False
    # :665 would move the routers' biases toward a balanced load; modules/router_bias.py switches it on if it is wanted
    config.moe_router_enable_expert_bias = False


def mark_shared_keys(model: torch.nn.Module) -> None:
    """Mark the rotary key of latent attention, which all heads share, for the patched gather of `install`.

    Call it after a model is built.
    """
    for module in model.modules():
        if isinstance(module, multi_latent_attention.MLASelfAttention):
            widths = (module.config.kv_lora_rank, module.config.qk_pos_emb_head_dim)
            module.linear_kv_down_proj.register_forward_hook(functools.partial(_mark, widths))


@contextmanager
def device_groups(device: torch.device) -> Iterator[None]:
    """Let Megatron create its process groups inside the block with NCCL alone, if the ranks compute on CUDA.

    parallel_state.py:259 creates groups with the backends of the default group, which has gloo for the program's own
    exchanges. Megatron expects NCCL groups and sends tensors of the device through them, and gloo would open one socket
    for each member of each of about twenty groups (parallel/gloo_descriptors.py).
    """
    create = parallel_state.create_group

    @functools.wraps(create)
    def create_on_device(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        return create(*args, backend=backend or "nccl", **kwargs)

    if device.type == "cuda":
        parallel_state.create_group = create_on_device
    try:
        yield
    finally:
        parallel_state.create_group = create


@contextmanager
def placeholder_steps(optimizer: Any) -> Iterator[None]:
    """Give optimizers without parameters a step counter inside the block: that of the other optimizers, or 0.

    distrib_optimizer.py:838 asserts that each optimizer of a rank has parameters with a step. The optimizer of experts
    has none on a pipeline stage without experts, and no optimizer has one before the first step. With the optimizers
    of Transformer Engine or Apex, which count steps per group of parameters, Megatron accepts both (:852).
    """
    if distrib_optimizer.HAVE_APEX_OR_TE:
        yield
        return
    adams = [inner.optimizer for inner in getattr(optimizer, "chained_optimizers", [optimizer])]
    steps = [state["step"].item() for adam in adams for state in adam.state.values()]
    without = [adam for adam in adams if not adam.state]
    for adam in without:
        adam.state["placeholder"] = {"step": torch.tensor(max(steps, default=0.0), device="cpu")}
    try:
        yield
    finally:
        for adam in without:
            del adam.state["placeholder"]


def _with_own_step(setter: Any) -> Any:
    """Give every parameter its own step tensor when a checkpoint is loaded.

    distrib_optimizer.py:1222 expects the key `step` among the loaded tensors, but the checkpoint stores it elsewhere.
    :1032 gives all parameters one shared step tensor, which AdamW would then increment once per parameter.
    """

    @functools.wraps(setter)
    def set_states(self: Any, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state and torch.is_tensor(state["step"]):
            state["step"] = state["step"].clone()
            tensors = {"step": state["step"], **tensors}
        setter(self, model_param, tensors)

    set_states.keeps_own_step = True  # type: ignore[attr-defined]
    return set_states


def _without_query_norm(projection: Any) -> Any:
    """Build an uncompressed query projection of latent attention without a norm.

    mla_qk_norm_config.py:148 requires a norm inside the query projection if the latent vectors of keys and values have
    one. DeepSeek-V2-Lite has none there (q_lora_rank is null, `q_proj` reads the layer's normalized input).
    """

    @functools.wraps(projection)
    def projection_class(self: Any, module_spec: Any, module_name: str) -> Any:
        if module_name == "linear_q_proj":
            return self._non_fused_or_default(module_spec, module_name)
        return projection(self, module_spec, module_name)

    projection_class.leaves_queries = True  # type: ignore[attr-defined]
    return projection_class


def _mark(widths: tuple[int, int], module: torch.nn.Module, inputs: Any, outputs: tuple[Tensor, Any]) -> None:
    del module, inputs
    outputs[0].latent_and_key = widths  # type: ignore[attr-defined]


def _summing_shared_key(gather: Any) -> Any:
    """Sum the gradient of the shared rotary key over the tensor-parallel ranks.

    multi_latent_attention.py:739 gathers the latent vector and the rotary key, and its backward pass only splits. That
    is correct for the latent vector, whose gradient the up-projection has already summed over the tensor-parallel
    ranks. The heads of one rank give only a part of the gradient of the key.
    """

    @functools.wraps(gather)
    def gathered(x: Tensor, group: Any = None) -> Tensor:
        whole: Tensor = gather(x, group)
        widths = getattr(x, "latent_and_key", None)
        if widths is None:
            return whole
        latent, key = torch.split(whole, widths, dim=-1)
        return torch.cat([latent, mappings.copy_to_tensor_model_parallel_region(key, group)], dim=-1)

    gathered.sums_shared_key = True  # type: ignore[attr-defined]
    return gathered


def _group_limited_topk(
    best: int, scores: Tensor, topk: int, num_tokens: int, num_experts: int, num_groups: int, group_topk: int
) -> tuple[Tensor, Tensor]:
    """Return the best `topk` scores [T, k] and their experts [T, k] within the best `group_topk` groups.

    The score of a group is the sum of its `best` largest scores.

    Source: DeepSeek-V2, arXiv:2405.04434, section 2.2.2; V3, arXiv:2412.19437, section 2.1.2.
    """
    size = num_experts // num_groups
    group_scores = scores.view(num_tokens, num_groups, size).topk(best, dim=-1).values.sum(-1)
    chosen = torch.zeros_like(group_scores, dtype=torch.bool)
    chosen.scatter_(1, group_scores.topk(group_topk, dim=-1).indices, True)
    masked = scores.masked_fill(~chosen.repeat_interleave(size, dim=1), float("-inf"))
    values, experts = masked.topk(topk, dim=1)
    return values, experts
