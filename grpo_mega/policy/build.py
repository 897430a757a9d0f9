"""Builds the policy's Megatron objects: process groups, the model in its data-parallel wrapper, the optimizer.

The only division of the loss is ours (types.Microbatch.token_weights): `calculate_per_token_loss` keeps the
data-parallel wrapper and the schedule from dividing, `finalize_without_division` keeps Megatron's last step from it.
Asserted by tests/parallel/test_update.py: the gradient is the same for every split of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from grpo_mega.config.schema import OptimizerConfig, ParallelConfig, PrecisionConfig
from grpo_mega.convert.rules import padded_vocab
from grpo_mega.convert.spec import ModelSpec
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.policy import cpu, quirks

cpu.prepare_import()

import megatron.core.optimizer as megatron_optimizer  # noqa: E402 - only after prepare_import
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import gpt_layer_specs  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

from grpo_mega.policy.attention import PackedSpecProvider, RMSNorm  # noqa: E402
from grpo_mega.policy.model import PolicyModel  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class MegatronParts:
    """What one rank trains with. `models` are its model chunks in the order of the model (one but under interleaved
    pipelining), `ddps` the same in their data-parallel wrappers."""

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
        """Of all model chunks."""
        return [p for model in self.models for p in model.parameters()]


def init_groups(ranks: Ranks, timeout_seconds: float) -> None:
    """Megatron's process groups for the layout of `ranks`; they are Megatron's own globals."""
    cpu.install()
    quirks.install()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
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


def transformer_config(spec: ModelSpec, parallel: ParallelConfig, precision: PrecisionConfig) -> TransformerConfig:
    """Megatron's description of `spec`. On CUDA the fused kernels of Transformer Engine are used, elsewhere none."""
    dtype, cuda = DTYPES[precision.dtype], torch.cuda.is_available()
    return TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_size,
        num_attention_heads=spec.num_heads,
        num_query_groups=spec.num_kv_heads,
        kv_channels=spec.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=spec.norm_eps,
        qk_layernorm=spec.qk_norm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=spec.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        num_layers_in_first_pipeline_stage=parallel.num_layers_first_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_last_stage,
        pipeline_model_parallel_layout=parallel.pipeline_layout,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
        sequence_parallel=parallel.sequence_parallel,
        **_recompute(parallel),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not cuda,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=cuda,
        persist_layer_norm=cuda,
        calculate_per_token_loss=True,
        **quirks.PIPELINE_MESSAGES,
    )


def _recompute(parallel: ParallelConfig) -> dict[str, Any]:
    if parallel.recompute == "none":
        return {}
    if parallel.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    modules = parallel.recompute_modules or ("core_attn",)
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


def build_policy(
    spec: ModelSpec,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    optimizer: OptimizerConfig,
    ranks: Ranks,
) -> MegatronParts:
    """The model with weights yet to be loaded (policy/weights.py), its wrapper and its distributed optimizer."""
    config = transformer_config(spec, parallel, precision)
    models = [_chunk(config, spec, parallel, chunk).to(ranks.device) for chunk in range(parallel.vpp)]
    cpu.install()  # modules that were imported while the model was built
    ddps = [
        DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=True,
                overlap_grad_reduce=parallel.overlap_grad_reduce,
                overlap_param_gather=parallel.overlap_param_gather,
            ),
            model,
            disable_bucketing=chunk > 0,  # only the first chunk's reduction is waited for
        )
        for chunk, model in enumerate(models)
    ]
    adam = megatron_optimizer.get_megatron_optimizer(
        megatron_optimizer.OptimizerConfig(
            optimizer="adam",
            lr=optimizer.lr,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.beta1,
            adam_beta2=optimizer.beta2,
            adam_eps=optimizer.eps,
            clip_grad=optimizer.clip_grad,
            params_dtype=config.params_dtype,
            bf16=config.bf16,
            use_distributed_optimizer=True,
        ),
        ddps,
        use_gloo_process_groups=False,
    )
    for group in adam.param_groups:  # norms and biases have wd_mult 0, which only Megatron's own scheduler would apply
        group["weight_decay"] = optimizer.weight_decay * group["wd_mult"]
    config.finalize_model_grads_func = finalize_without_division
    if parallel.overlap_grad_reduce:
        no_sync = [ddp.no_sync for ddp in ddps]  # until the last microbatch
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return MegatronParts(config, models, ddps, adam)


def _chunk(config: TransformerConfig, spec: ModelSpec, parallel: ParallelConfig, chunk: int) -> PolicyModel:
    """Model chunk `chunk` of this rank's `vpp`."""
    stage = chunk if parallel.vpp > 1 else None
    return PolicyModel(
        config,
        _layer_spec(config, stage),
        vocab_size=padded_vocab(spec.vocab_size, parallel.tp),
        max_sequence_length=spec.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        parallel_output=True,
        share_embeddings_and_output_weights=spec.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=spec.rope_theta,
        vp_stage=stage,
    )


def finalize_without_division(model: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:
    """Megatron's reductions of gradients over ranks, without its division by the number of tokens."""
    del num_tokens
    finalize_model_grads(model, None, **kwargs)


def _layer_spec(config: TransformerConfig, vp_stage: int | None) -> Any:
    transformer_engine = torch.cuda.is_available()
    if not transformer_engine:
        # hard-coded at gpt_layer_specs.py:344 (layers) and :644 (final norm)
        gpt_layer_specs.LocalSpecProvider = PackedSpecProvider
        gpt_layer_specs.LNImpl = RMSNorm
    return gpt_layer_specs.get_gpt_decoder_block_spec(
        config, use_transformer_engine=transformer_engine, normalization="RMSNorm", vp_stage=vp_stage
    )
