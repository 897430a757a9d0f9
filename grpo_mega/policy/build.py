"""Builds the Megatron objects of the policy: process groups, the model in its data-parallel wrapper, the optimizer.

Only types.Microbatch.token_weights divides the loss. `calculate_per_token_loss` keeps the data-parallel wrapper and
the schedule from dividing, and `finalize_without_division` keeps Megatron's last step from dividing.
Asserted by tests/parallel/test_update.py: the gradient is the same for every split of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from grpo_mega.config.policy_sections import OptimizerConfig, ParallelConfig, PrecisionConfig
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.overlap import with_overlap
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.policy import fp8
from grpo_mega.policy.megatron_arguments import split_arguments
from grpo_mega.policy.megatron_patches import checkpoint_reading, cpu, fixes, host_optimizer, local_modules
from grpo_mega.policy.module_choice import ModuleChoice
from grpo_mega.policy.muon import use_muon

cpu.prepare_import()

import megatron.core.optimizer as megatron_optimizer  # noqa: E402 - only after prepare_import
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.transformer import TransformerConfig  # noqa: E402

from grpo_mega.policy.modules.policy_model import PolicyModel  # noqa: E402
from grpo_mega.policy.optimizer_config import optimizer_config  # noqa: E402
from grpo_mega.policy.transformer_config import build_models, transformer_config  # noqa: E402


@dataclass(frozen=True)
class MegatronParts:
    """The Megatron objects of one rank.

    `models` are its model chunks in the order of the model; interleaved pipelining has several. `ddps` are the same
    chunks in their data-parallel wrappers.
    """

    config: TransformerConfig
    models: list[PolicyModel]
    ddps: list[DistributedDataParallel]
    optimizer: Any  # megatron's optimizer, chained or not

    @property
    def buffers(self) -> list[Any]:
        """The flat buffers that hold all parameters and gradients."""
        return [b for ddp in self.ddps for b in (*ddp.buffers, *ddp.expert_parallel_buffers)]

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The parameters of all model chunks."""
        return [p for model in self.models for p in model.parameters()]


def init_groups(ranks: Ranks, timeout_seconds: float) -> None:
    """Create Megatron's process groups, which are its own globals, for the layout of `ranks`."""
    cpu.install()
    fixes.install()
    checkpoint_reading.install()
    local_modules.install()
    host_optimizer.install()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    with fixes.device_groups(ranks.device):
        parallel_state.initialize_model_parallel(
            ranks.topology.tp,
            ranks.topology.pp,
            ranks.topology.vpp if ranks.topology.vpp > 1 else None,
            context_parallel_size=ranks.topology.cp,
            expert_model_parallel_size=ranks.topology.ep,
            expert_tensor_parallel_size=ranks.topology.etp,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=max(1, round(timeout_seconds / 60)),
        )
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def build_policy(
    spec: ModelSpec,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    optimizer: OptimizerConfig,
    ranks: Ranks,
    modules: ModuleChoice,
    model: type[PolicyModel] = PolicyModel,
) -> MegatronParts:
    """Build the model, its data-parallel wrapper and its distributed optimizer.

    The weights must be loaded afterwards (policy/weight_source.py).
    """
    copies = ranks.topology.dp * ranks.topology.cp
    parallel = with_overlap(parallel, copies=copies, on_cuda=ranks.device.type == "cuda")
    passed = split_arguments(parallel.megatron)
    config = transformer_config(spec, parallel, precision, modules)
    models = build_models(spec, config, parallel, ranks, model)
    ddp_config = DistributedDataParallelConfig(**(ddp_fields(parallel, precision) | passed.ddp))
    ddps = [
        DistributedDataParallel(
            config,
            ddp_config,
            model,
            disable_bucketing=chunk > 0,  # only the first chunk's reduction is waited for
        )
        for chunk, model in enumerate(models)
    ]
    adam = megatron_optimizer.get_megatron_optimizer(
        optimizer_config(optimizer, precision, passed.optimizer),
        ddps,
        use_gloo_process_groups=False,
    )
    if optimizer.name == "muon":
        use_muon(adam, models, optimizer.momentum_of_muon)
    for group in (
        adam.param_groups
    ):  # only Megatron's scheduler, which is not used here, applies wd_mult (0 for norms and biases)
        group["weight_decay"] = optimizer.weight_decay * group["wd_mult"]
    config.finalize_model_grads_func = finalize_without_division
    if parallel.overlap_grad_reduce:
        no_sync = [ddp.no_sync for ddp in ddps]  # until the last microbatch
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return MegatronParts(config, models, ddps, adam)


def ddp_fields(parallel: ParallelConfig, precision: PrecisionConfig) -> dict[str, Any]:
    """Return the fields of Megatron's DistributedDataParallelConfig that the program sets."""
    return {
        "grad_reduce_in_fp32": True,
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": parallel.overlap_grad_reduce,
        "overlap_param_gather": parallel.overlap_param_gather,
        **fp8.ddp_fields(precision),
    }


def finalize_without_division(model: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:
    """Run Megatron's reductions of gradients over ranks without its division by the number of tokens."""
    del num_tokens
    finalize_model_grads(model, None, **kwargs)
