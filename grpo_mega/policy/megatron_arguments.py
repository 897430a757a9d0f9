"""Arguments of `parallel.megatron`: fields of Megatron-Core's own configs that the program passes through.

A name reaches `TransformerConfig` (`MLATransformerConfig` for latent attention), `DistributedDataParallelConfig` or
`OptimizerConfig`, whichever declares it. A prefix (`transformer.`, `ddp.` or `optimizer.`) selects the class when
several declare the name. Fields that the program sets itself, and fields that it does not support, are rejected.
Asserted by tests/unit/policy/test_megatron_arguments.py.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from grpo_mega.config.nearest_name import nearest_name
from grpo_mega.config.pass_through import ValueLimit, check_arguments, dataclass_types, unknown_name_remedy
from grpo_mega.policy.megatron_patches import cpu
from grpo_mega.types import UserError

cpu.prepare_import()

from megatron.core.distributed import DistributedDataParallelConfig  # noqa: E402 - only after prepare_import
from megatron.core.optimizer import OptimizerConfig  # noqa: E402
from megatron.core.transformer import MLATransformerConfig  # noqa: E402

KEY = "parallel.megatron"
CLASSES: Mapping[str, type[Any]] = {
    "transformer": MLATransformerConfig,  # a subclass of TransformerConfig that adds latent attention
    "ddp": DistributedDataParallelConfig,
    "optimizer": OptimizerConfig,
}


@dataclass(frozen=True)
class MegatronArguments:
    """Checked fields for each of Megatron's configs."""

    transformer: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)


def split_arguments(given: Mapping[str, Any]) -> MegatronArguments:
    """Check the value of `parallel.megatron` and return its fields by class.

    Args:
        given: names, with or without a prefix, and their values. A prefix may hold a mapping: `ddp: {bucket_size: 1}`.

    Raises:
        UserError: a field is unknown (names the nearest), is set by the program (names the config key), is not
            supported, has the wrong type, is outside of its limits, occurs twice, or is declared by several classes and
            has no prefix.
    """
    found = MegatronArguments()
    written: dict[tuple[str, str], str] = {}  # (class, field) -> the name that the user wrote
    for name, value in _flattened(given):
        prefix, _, field_name = name.rpartition(".")
        if prefix and prefix not in CLASSES:
            raise UserError(
                f"{KEY}.{name}: {prefix!r} is not a prefix", remedy=f"use one of {', '.join(f'{s}.' for s in CLASSES)}"
            )
        section = prefix or _section_of(name, value)
        _check_field(section, prefix, field_name, value)
        first = written.setdefault((section, field_name), name)
        if first != name or field_name in getattr(found, section):
            raise UserError(
                f"{KEY}.{name}={value!r}: {KEY}.{first} sets the same field of Megatron's {_class_name(section)}",
                remedy="remove one of the two",
            )
        kind = _ENUMS.get((section, field_name))
        getattr(found, section)[field_name] = value if kind is None else kind[value]
    return found


def _flattened(given: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in given.items():
        if name not in CLASSES:
            yield name, value
        elif isinstance(value, Mapping):  # from parallel.megatron.ddp.bucket_size=1
            yield from ((f"{name}.{short}", each) for short, each in value.items())
        else:
            raise UserError(
                f"{KEY}.{name}={value!r}: {name} is the prefix of a class and must hold a mapping of its fields",
                remedy=f"write {KEY}.{name}.FIELD=VALUE",
            )


def _section_of(name: str, value: Any) -> str:
    """Return the class that declares a name without a prefix."""
    declaring = [section for section in CLASSES if name in _TYPES[section]]
    if not declaring:
        every_type = {each: kind for fields in _TYPES.values() for each, kind in fields.items()}
        owned = {each: key for fields in OWNED.values() for each, key in fields.items()}
        raise UserError(
            f"{KEY}.{name}={value!r}: no field of this name exists in {' or '.join(map(_class_name, CLASSES))}",
            remedy=unknown_name_remedy(f"{KEY}.{name}", name, [*every_type], owned),
        )
    if len(declaring) > 1 and any(name not in OWNED[s] and name not in NOT_SUPPORTED[s] for s in declaring):
        raise UserError(
            f"{KEY}.{name}: Megatron's {' and '.join(map(_class_name, declaring))} both declare this field",
            remedy="write " + " or ".join(f"{section}.{name}" for section in declaring),
        )
    return declaring[0]


def _check_field(section: str, prefix: str, name: str, value: Any) -> None:
    """Check one field of a class; messages name it with the prefix that the user wrote."""
    key = f"{KEY}.{prefix}" if prefix else KEY
    if name in NOT_SUPPORTED[section]:
        raise UserError(
            f"{key}.{name}={value!r} is not supported: {NOT_SUPPORTED[section][name]}", remedy=f"remove {key}.{name}"
        )
    if name not in _TYPES[section]:
        others = [other for other in CLASSES if name in _TYPES[other]]
        near = nearest_name(name, _TYPES[section])
        full = f"{others[0]}.{name}" if others else f"{section}.{near}" if near else ""
        raise UserError(
            f"{key}.{name}={value!r}: no field of this name exists in Megatron's {_class_name(section)}",
            remedy=f"did you mean {full}?" if full else f"remove {key}.{name}",
        )
    target = f"Megatron's {_class_name(section)}"
    check_arguments(key, {name: value}, _TYPES[section], OWNED[section], target, LIMITS[section])


def _class_name(section: str) -> str:
    return "TransformerConfig" if section == "transformer" else CLASSES[section].__name__


def _by_name(table: Mapping[str, str]) -> dict[str, str]:
    """Invert config key -> names, separated by spaces, into name -> config key."""
    return {name: key for key, names in table.items() for name in names.split()}


OWNED: Mapping[str, Mapping[str, str]] = {
    "transformer": _by_name(
        {
            "": """calculate_per_token_loss perform_initialization moe_router_dtype moe_router_load_balancing_type
            moe_token_dispatcher_type batch_p2p_comm hidden_dropout attention_dropout finalize_model_grads_func
            no_sync_func grad_scale_func grad_sync_func param_sync_func timers init_method output_layer_init_method
            embedding_init_method _cpu_offloading_context""",
            "policy.modules": """transformer_impl use_cpu_initialization init_model_with_meta_device apply_rope_fusion
            persist_layer_norm moe_grouped_gemm gradient_accumulation_fusion bias_activation_fusion bias_dropout_fusion
            masked_softmax_fusion moe_permute_fusion""",
            "parallel.tp": "tensor_model_parallel_size",
            "parallel.pp": "pipeline_model_parallel_size",
            "parallel.vpp": "virtual_pipeline_model_parallel_size",
            "parallel.cp": "context_parallel_size",
            "parallel.ep": "expert_model_parallel_size",
            "parallel.etp": "expert_tensor_parallel_size",
            "parallel.sequence_parallel": "sequence_parallel",
            "parallel.num_layers_first_stage": "num_layers_in_first_pipeline_stage",
            "parallel.num_layers_last_stage": "num_layers_in_last_pipeline_stage",
            "parallel.pipeline_layout": """pipeline_model_parallel_layout account_for_embedding_in_pipeline_split
            account_for_loss_in_pipeline_split""",
            "parallel.recompute": """recompute_granularity recompute_method recompute_num_layers
            distribute_saved_activations moe_layer_recompute num_microbatches_with_partial_activation_checkpoints""",
            "parallel.recompute_modules": "recompute_modules",
            "precision.dtype": "params_dtype pipeline_dtype bf16 fp16 enable_autocast autocast_dtype",
            "precision.fp8": """fp8 fp8_quantizer_factory fp8_margin fp8_interval fp8_amax_compute_algo fp8_wgrad
            fp8_dot_product_attention fp8_multi_head_attention tp_only_amax_red first_last_layers_bf16
            moe_router_padding_for_quantization moe_router_padding_for_fp8 activation_func_fp8_input_store""",
            "precision.fp8.recipe": "fp8_recipe",
            "precision.fp8.params": "fp8_param",
            "precision.fp8.amax_history": "fp8_amax_history_len",
            "precision.fp8.first_layers_bf16": "num_layers_at_start_in_bf16",
            "precision.fp8.last_layers_bf16": "num_layers_at_end_in_bf16",
            "algorithm.routing_replay": "moe_enable_routing_replay",
            "algorithm.router_bias_update_rate": "moe_router_bias_update_rate",
            "algorithm.aux_loss_coef": "moe_aux_loss_coeff",
            "model.path": """num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels
            normalization layernorm_epsilon qk_layernorm gated_linear_unit activation_func add_bias_linear add_qkv_bias
            softmax_type softmax_scale window_size window_attn_skip_freq num_moe_experts moe_layer_freq
            moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_shared_expert_gate moe_router_topk
            moe_router_score_function moe_router_pre_softmax moe_router_num_groups moe_router_group_topk
            moe_router_topk_limited_devices moe_router_topk_scaling_factor moe_router_enable_expert_bias
            moe_latent_size moe_apply_probs_on_input multi_latent_attention q_lora_rank
            kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rope_type rotary_base rotary_percent
            rotary_interleaved rotary_scaling_factor original_max_position_embeddings beta_fast beta_slow mscale
            mscale_all_dim no_rope_freq mrope_section qk_l2_norm attention_output_gate glu_linear_offset
            activation_func_clamp_value layernorm_zero_centered_gamma apply_residual_connection_post_layernorm
            apply_query_key_layer_scaling""",
        }
    ),
    "ddp": _by_name(
        {
            "": "grad_reduce_in_fp32 use_distributed_optimizer average_in_collective gradient_reduce_div_fusion",
            "parallel.overlap_grad_reduce": "overlap_grad_reduce",
            "parallel.overlap_param_gather": "overlap_param_gather",
            "precision.fp8.params": "fp8_param_gather reuse_grad_buf_for_mxfp8_param_ag keep_fp8_transpose_cache",
        }
    ),
    "optimizer": _by_name(
        {
            "": "optimizer use_distributed_optimizer decoupled_weight_decay timers",
            "optimizer.lr": "lr decoupled_lr",
            "optimizer.min_lr": "min_lr decoupled_min_lr",
            "optimizer.weight_decay": "weight_decay",
            "optimizer.beta1": "adam_beta1",
            "optimizer.beta2": "adam_beta2",
            "optimizer.eps": "adam_eps",
            "optimizer.clip_grad": "clip_grad",
            "optimizer.host_fraction": """optimizer_cpu_offload optimizer_offload_fraction overlap_cpu_optimizer_d2h_h2d
            use_precision_aware_optimizer use_torch_optimizer_for_cpu_offload""",
            "parallel.overlap_param_gather": "overlap_param_gather overlap_param_gather_with_optimizer_step",
            "precision.dtype": "params_dtype bf16 fp16",
            "precision.fp8.recipe": "fp8_recipe",
            "precision.fp8.params": "reuse_grad_buf_for_mxfp8_param_ag",
        }
    ),
}
"""Class -> field -> config key that sets it; an empty key where the program always sets the same value."""

_MEMORY = "the planner does not count how it changes memory"
_MODEL = "no supported model family has such modules"
_LOSS = "Megatron scales router losses for a division by the number of tokens that this program does not make"
_ENGINE = "the engine would not compute the same function as the policy"
_UNUSED = "it has no effect in this program"
_PARAMETERS = "the mapping of a checkpoint's tensors expects the parameters that Megatron builds without it"
_SHARDS = "weight sync and checkpoints read the buffers of Megatron's plain distributed optimizer"

NOT_SUPPORTED: Mapping[str, Mapping[str, str]] = {
    "transformer": _by_name(
        {
            _MEMORY: """cpu_offloading cpu_offloading_num_layers cpu_offloading_activations cpu_offloading_weights
            cpu_offloading_double_buffering fine_grained_activation_offloading offload_modules
            min_offloaded_tensor_size fp32_residual_connection memory_efficient_layer_norm
            enable_cuda_graph cuda_graph_use_single_mempool cuda_graph_retain_backward_graph cuda_graph_warmup_steps
            external_cuda_graph cuda_graph_impl cuda_graph_scope
            overlap_moe_expert_parallel_comm ep_overlap_early_attn_memory_release delay_wgrad_compute
            defer_embedding_wgrad_compute wgrad_deferral_limit
            deallocate_pipeline_outputs microbatch_group_size_per_vp_stage activation_offload_fraction
            cpu_offloading_retain_pinned_cpu_buffers cuda_graph_modules delay_offload_until_cuda_graph
            delta_offload_bytes_across_pp_ranks fine_grained_offloading_max_inflight_offloads mlp_chunks_for_training
            moe_paged_stash moe_paged_stash_buffer_size_factor_cpu moe_paged_stash_buffer_size_factor_cuda
            moe_paged_stash_page_size overlap_dispatch_backward_with_experts_wgrad""",
            _MODEL: """mtp_num_layers mtp_loss_scaling_factor mtp_standalone experimental_attention_variant
            dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_loss_coeff
            dsa_indexer_use_sparse_loss linear_attention_freq linear_conv_kernel_dim linear_key_head_dim
            linear_value_head_dim linear_num_key_heads linear_num_value_heads is_hybrid_model mamba_state_dim
            mamba_head_dim mamba_num_groups mamba_num_heads use_mamba_mem_eff_path heterogeneous_block_specs
            hetereogenous_dist_checkpoint
            dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32 dsa_indexer_rope_interleaved
            dsa_indexer_rotate_activation dsa_indexer_scoring_relu dsa_indexer_skip_topk_offset dsa_indexer_topk_freq
            dsa_kernel_backend experimental_attention_variant_loss_scale_func mamba_training_ssm_states_dtype
            mtp_detach_heads mtp_grad_scale_func mtp_hybrid_override_pattern mtp_use_repeated_layer use_mup
            mup_attn_scale_power mup_base_head_dim mup_base_hidden_size mup_embedding_mult mup_output_mult
            mup_width_mult""",
            _PARAMETERS: """mla_down_proj_fusion moe_single_grouped_weight moe_single_grouped_bias
            moe_mlp_glu_interleave_size moe_shared_expert_glu_interleave_size use_grouped_gemm_for_dense_mlp
            use_grouped_gemm_for_shared_expert use_transformer_engine_op_fuser""",
            _SHARDS: """gtp_weight_remat_size expert_gtp_weight_remat_size tensor_parallel_num_weight_shards
            expert_tensor_parallel_num_weight_shards""",
            _LOSS: "moe_z_loss_coeff moe_grad_scale_func",
            _ENGINE: """moe_input_jitter_eps moe_token_dropping moe_expert_capacity_factor moe_token_drop_policy
            moe_pad_expert_input_to_capacity moe_router_force_load_balancing qk_clip qk_clip_alpha qk_clip_threshold
            moe_expert_rank_capacity_factor moe_router_force_biased moe_router_quantile_balancing_ema fp8_output_proj
            fp4 fp4_recipe fp4_param fp4_quantizer_factory quant_recipe use_kitchen use_kitchen_attention
            kitchen_attention_backend test_mode""",
            _UNUSED: """init_method_std embedding_init_method_std cross_entropy_loss_fusion cross_entropy_fusion_impl
            flash_decode cache_mla_latents inference_rng_tracker inference_sampling_seed use_inference_optimized_layers
            inference_fuse_tp_communication mlp_chunks_for_prefill symmetric_ar_type
            inference_cuda_graph_scope inference_disable_triton_nvls_kernels inference_grouped_gemm_backend
            inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type
            moe_pad_experts_for_cuda_graph_inference nccl_all_reduce_for_prefill
            moe_per_layer_logging log_max_attention_logit use_fused_weighted_squared_relu
            pipeline_model_parallel_comm_backend""",
            "the program does not create the user buffers of Transformer Engine": """tp_comm_overlap tp_comm_bulk_wgrad
            tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag
            tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs tp_comm_overlap_disable_qkv
            tp_comm_overlap_disable_fc1 tp_comm_bootstrap_backend""",
            "the program creates Megatron's own random-number trackers": "use_te_rng_tracker",
            "it needs the token dispatcher `flex`, and the program uses `alltoall`": """moe_enable_deepep
            moe_flex_dispatcher_backend moe_deepep_num_sms moe_hybridep_num_sms moe_flex_dispatcher_num_sms
            moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing
            moe_hybridep_pad_uneven_dispatch_inputs moe_permute_fusion_into_hybridep moe_ncclep_static_shape
            moe_ncclep_zero_copy""",
            "the packing of rows assumes the plain context-parallel layout": """hierarchical_context_parallel_sizes
            hybrid_context_parallel max_seqlen_per_dp_cp_rank variable_seq_lengths""",
        }
    ),
    "ddp": _by_name(
        {
            _SHARDS: """use_megatron_fsdp use_custom_fsdp data_parallel_sharding_strategy
            fsdp_all_gather_in_start_param_sync fsdp_db_use_persist_buf_on_alloc_fail megatron_fsdp_cuda_graph_mode
            megatron_fsdp_enable_fine_grained_param_gather megatron_fsdp_grad_comm_dtype megatron_fsdp_main_grads_dtype
            megatron_fsdp_main_params_dtype megatron_fsdp_max_pool_double_buffer megatron_fsdp_use_decoupled_grad
            suggested_communication_unit_size fsdp_double_buffer outer_dp_sharding_strategy fsdp_manual_registration
            num_distributed_optimizer_instances""",
            _MEMORY: """nccl_ub disable_symmetric_registration delay_wgrad_compute
            param_name_patterns_for_fp32_local_accumulation""",
            _ENGINE: "fp4_param_gather",
        }
    ),
    "optimizer": _by_name(
        {
            _MEMORY: """main_grads_dtype main_params_dtype exp_avg_dtype exp_avg_sq_dtype store_param_remainders
            optimizer_cuda_graph""",
            _SHARDS: "use_layer_wise_distributed_optimizer",
            "Megatron would leave out an update that this program counts": "grad_norm_skip_threshold",
            _UNUSED: """log_num_zeros_in_grad loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis
            sgd_momentum muon_momentum muon_split_qkv muon_nesterov muon_scale_mode muon_fp32_matmul_prec
            muon_num_ns_steps muon_tp_mode muon_extra_scale_factor muon_coefficient_type muon_scalar_optimizer
            adaptive_muon_beta2 adaptive_muon_eps adaptive_muon_moment2_method lion_beta1 lion_beta2
            soap_precondition_frequency soap_shampoo_beta soap_use_kl_shampoo""",
        }
    ),
}
"""Class -> field -> reason. A field that changes memory is here unless the planner counts it."""

LIMITS: Mapping[str, Mapping[str, ValueLimit]] = {
    # "p2p" and the others are the values that Transformer Engine accepts; "a2a+p2p" needs hierarchical groups
    "transformer": {"cp_comm_type": ValueLimit(choices=("p2p", "all_gather", "a2a"))},
    "ddp": {"bucket_size": ValueLimit(ge=1)},
    "optimizer": {},
}
"""Class -> field -> values that Megatron or its kernels can use, for fields that their classes do not check."""

_ENUMS: dict[tuple[str, str], type[enum.Enum]] = {}
_TYPES: dict[str, dict[str, Any]] = {}


def _read_types() -> None:
    """Fill the tables of field types; a field of an enumeration takes the name of a member."""
    from typing import Literal

    for section, target in CLASSES.items():
        _TYPES[section] = dataclass_types(target)
        for name, kind in _TYPES[section].items():
            if isinstance(kind, type) and issubclass(kind, enum.Enum):
                _ENUMS[section, name] = kind
                _TYPES[section][name] = Literal[tuple(kind.__members__)]


_read_types()
