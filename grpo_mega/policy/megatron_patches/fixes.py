"""Faults of Megatron-Core 0.16 that are repaired from outside, each with its line. Applied on every machine.

Each repair has a test that fails without it: in tests/parallel/test_checkpoint.py (optimizer state, the queue),
tests/parallel/test_update.py (pipeline messages), tests/parallel/test_families.py (reductions, experts, latent
attention) and tests/unit/policy/megatron_patches/test_fixes.py (groups of experts, steps of optimizers).
"""

from __future__ import annotations

import functools
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from grpo_mega.models.parameter_tables import is_expert_parameter
from grpo_mega.models.spec import ModelSpec
from grpo_mega.policy.megatron_patches import cpu

cpu.prepare_import()

from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402 - only after prepare_import
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
from megatron.core.tensor_parallel import mappings  # noqa: E402
from megatron.core.transformer import multi_latent_attention  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402

# Of a pipeline's messages, for TransformerConfig. p2p_communication.py:28-47 posts send-previous, receive-previous,
# send-next, receive-next on one group. With two stages previous and next are the same rank, where messages match in
# order: an interleaved schedule takes a gradient for an activation.
PIPELINE_MESSAGES = {"batch_p2p_comm": False}


def install() -> None:
    """Idempotent."""
    setter = DistributedOptimizer._set_main_param_and_optimizer_states
    if not getattr(setter, "keeps_own_step", False):
        DistributedOptimizer._set_main_param_and_optimizer_states = _with_own_step(setter)
    sharded = DistributedOptimizer.sharded_param_state_fully_reshardable
    if not getattr(sharded, "counts_padding", False):
        DistributedOptimizer.sharded_param_state_fully_reshardable = _counting_padding(sharded)
    # filesystem_async.py:54 spawns a server process for a queue that a synchronous save puts into and gets from in this
    # process: seconds at the first save, 270 MB, and it outlives a rank that is killed
    filesystem_async._get_write_results_queue = _results_of_this_process
    if not getattr(mappings._reduce, "returns_the_sum", False):
        mappings._reduce = _reducing_contiguous(mappings._reduce)
    gather = multi_latent_attention.gather_from_tensor_model_parallel_region
    if not getattr(gather, "sums_shared_key", False):
        multi_latent_attention.gather_from_tensor_model_parallel_region = _summing_shared_key(gather)


def fit_to(spec: ModelSpec) -> None:
    """Before a model is built: moe_utils.py:548 scores a group by its topk // group_topk best experts. DeepSeek-V2
    takes the best one, V3 the two best, whatever those numbers are."""
    if spec.moe is not None:
        moe_utils.group_limited_topk = functools.partial(_group_limited_topk, spec.moe.group_best)


def separate_experts(model: torch.nn.Module) -> None:
    """After a model is built: tensor_parallel/layers.py:886 counts experts among the dense layers where ep = 1. Where
    their tensor parallelism is not that of those, other ranks hold the same ones, and their gradients would be summed
    over too few ranks, or with those of other shards."""
    for name, parameter in model.named_parameters():
        if is_expert_parameter(name):
            parameter.allreduce = False  # type: ignore[attr-defined]


def keep_after_build(config: Any) -> None:
    """After all models are built: settings that finalize_model_grads.py reads again, with another meaning."""
    if config.multi_latent_attention:
        # :354 takes the norms of latent vectors for those of single heads and sums what is complete already
        config.qk_layernorm = False
    # :476 would move the routers' biases towards a balanced load, which is pre-training's business
    config.moe_router_enable_expert_bias = False


def mark_shared_keys(model: torch.nn.Module) -> None:
    """After a model is built: latent attention's rotary key, which all heads share, is marked for `install`'s sum."""
    for module in model.modules():
        if isinstance(module, multi_latent_attention.MLASelfAttention):
            widths = (module.config.kv_lora_rank, module.config.qk_pos_emb_head_dim)
            module.linear_kv_down_proj.register_forward_hook(functools.partial(_mark, widths))


@contextmanager
def lent_steps(optimizer: Any) -> Iterator[None]:
    """distrib_optimizer.py:642 asserts that each of a rank's optimizers has parameters whose step it can read. That of
    experts has none on a pipeline stage without them, and before the first step nobody has: inside, it has the step of
    the others, or 0."""
    adams = [inner.optimizer for inner in getattr(optimizer, "chained_optimizers", [optimizer])]
    steps = [state["step"].item() for adam in adams for state in adam.state.values()]
    without = [adam for adam in adams if not adam.state]
    for adam in without:
        adam.state["lent"] = {"step": torch.tensor(max(steps, default=0.0))}
    try:
        yield
    finally:
        for adam in without:
            del adam.state["lent"]


def _with_own_step(setter: Any) -> Any:
    """distrib_optimizer.py:939 expects the key `step` among the loaded tensors, which the checkpoint keeps elsewhere;
    and :825 gives all parameters one shared step tensor, which AdamW then advances once per parameter."""

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


@functools.cache
def _results_of_this_process() -> queue.Queue[Any]:
    return queue.Queue()


def _counting_padding(sharded: Any) -> Any:
    """distrib_optimizer.py:1113 joins buckets without the padding at their ends, :1501 cuts parameters out of the
    result at offsets that count it: behind a padded bucket every parameter gets another's master weights and moments.
    (A tied head under pipeline parallelism has a bucket of its own.) Inside, buckets say that none of them is padded.
    """

    @functools.wraps(sharded)
    def state(self: Any, *args: Any, **kwargs: Any) -> Any:
        sized = [(b, b.grad_data.numel()) for buffer in self.buffers for b in (buffer, *buffer.buckets)]
        unpadded = [b.numel_unpadded for b, _ in sized]
        for b, numel in sized:
            b.numel_unpadded = numel
        try:
            return sharded(self, *args, **kwargs)
        finally:
            for (b, _), numel in zip(sized, unpadded, strict=True):
                b.numel_unpadded = numel

    state.counts_padding = True  # type: ignore[attr-defined]
    return state


def _reducing_contiguous(reduce: Any) -> Any:
    """mappings.py:31-33 all-reduces `input_.contiguous()` and returns `input_`: the sum of a strided tensor is lost."""

    @functools.wraps(reduce)
    def reduced(input_: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return reduce(input_.contiguous(), *args, **kwargs)  # type: ignore[no-any-return]

    reduced.returns_the_sum = True  # type: ignore[attr-defined]
    return reduced


def _mark(widths: tuple[int, int], module: torch.nn.Module, inputs: Any, outputs: tuple[Tensor, Any]) -> None:
    del module, inputs
    outputs[0].latent_and_key = widths  # type: ignore[attr-defined]


def _summing_shared_key(gather: Any) -> Any:
    """multi_latent_attention.py:607 gathers the latent vector and the rotary key; the backward pass only cuts. That is
    right for the latent vector, whose gradient the up-projection has summed over the tensor-parallel ranks, but each
    rank's heads yield only a part of the key's."""

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
    """The best `topk` scores [T, k] and their experts among the `group_topk` groups with the largest sum of their
    `best` largest scores. Source: DeepSeek-V2, arXiv:2405.04434, section 2.2.2; V3, arXiv:2412.19437, section 2.1.2."""
    size = num_experts // num_groups
    group_scores = scores.view(num_tokens, num_groups, size).topk(best, dim=-1).values.sum(-1)
    chosen = torch.zeros_like(group_scores, dtype=torch.bool)
    chosen.scatter_(1, group_scores.topk(group_topk, dim=-1).indices, True)
    masked = scores.masked_fill(~chosen.repeat_interleave(size, dim=1), float("-inf"))
    values, experts = masked.topk(topk, dim=1)
    return values, experts
