"""Megatron's config of a model, and the modules that are built from it.

Some settings are only correct while the model is built; `build_models` switches them off at its end
(fixes.keep_after_build). Asserted by tests/parallel/test_families.py.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from grpo_mega.config.policy_sections import ParallelConfig, PrecisionConfig
from grpo_mega.formats.megatron_args import expert_settings, latent_settings
from grpo_mega.models.placement_rules import padded_vocab
from grpo_mega.models.recompute import recomputed_modules
from grpo_mega.models.spec import ModelSpec, MoeSpec
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.policy import fp8
from grpo_mega.policy.megatron_arguments import split_arguments
from grpo_mega.policy.megatron_patches import cpu, fixes, head_gradient
from grpo_mega.policy.module_choice import ModuleChoice

cpu.prepare_import()

from megatron.core import parallel_state  # noqa: E402 - only after prepare_import
from megatron.core.models.gpt import gpt_layer_specs  # noqa: E402
from megatron.core.transformer import MLATransformerConfig, TransformerConfig  # noqa: E402
from megatron.core.transformer.identity_op import IdentityOp  # noqa: E402

from grpo_mega.policy.modules.clamped_experts import ClampedExperts  # noqa: E402
from grpo_mega.policy.modules.packed_attention import PackedSpecProvider, RMSNorm  # noqa: E402
from grpo_mega.policy.modules.policy_model import PolicyModel  # noqa: E402
from grpo_mega.policy.modules.rotary import megatron_mscale, set_frequencies  # noqa: E402
from grpo_mega.types import UserError  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(
    spec: ModelSpec, parallel: ParallelConfig, precision: PrecisionConfig, modules: ModuleChoice
) -> TransformerConfig:
    """Return Megatron's description of `spec`, with the fields of `parallel.megatron`.

    Raises:
        UserError: Megatron rejects a combination of fields that `parallel.megatron` is a part of, or one of the fields
            is not accepted (`split_arguments`).
    """
    passed = split_arguments(parallel.megatron).transformer
    settings = transformer_fields(spec, parallel, precision, modules) | passed
    kind = TransformerConfig if spec.mla is None else MLATransformerConfig
    try:
        config = kind(**settings)
    except (ValueError, AssertionError, TypeError) as error:
        if not passed:
            raise
        raise UserError(
            f"parallel.megatron={passed}: Megatron's TransformerConfig rejects it: {error}",
            remedy="remove the field that the message names",
        ) from error
    if spec.mla is None and spec.rope is not None and spec.rope.kind == "yarn":
        # not declared by the class: attention.py:1102 reads them with hasattr
        config.yarn_rotary_scaling_factor = spec.rope.factor
        config.yarn_mscale, config.yarn_mscale_all_dim = megatron_mscale(spec), 0.0
    return config


def transformer_fields(
    spec: ModelSpec, parallel: ParallelConfig, precision: PrecisionConfig, modules: ModuleChoice
) -> dict[str, Any]:
    """Return the fields of Megatron's TransformerConfig that the program sets."""
    dtype = DTYPES[precision.dtype]
    yarn = spec.rope is not None and spec.rope.kind == "yarn"
    settings: dict[str, Any] = {
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "ffn_hidden_size": spec.ffn_size,
        "num_attention_heads": spec.num_heads,
        "num_query_groups": spec.num_kv_heads,
        "kv_channels": spec.head_dim,
        **modules.fields(),
        "normalization": "RMSNorm",
        "layernorm_epsilon": spec.norm_eps,
        "qk_layernorm": spec.qk_norm,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": spec.qkv_bias,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **_layout_fields(parallel),
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        **_fused_kernels(spec, modules),
        # Transformer Engine has the kernels. The one of latent attention is for YaRN only (transformer_config.py:2966);
        # the one of other attention does not scale cosine and sine of packed rows, as YaRN requires (rope_utils.py:321)
        "apply_rope_fusion": modules.transformer_engine and yarn == (spec.mla is not None),
        "calculate_per_token_loss": True,
        **fp8.transformer_fields(precision, has_experts=spec.moe is not None),
        **fixes.PIPELINE_MESSAGES,
    }
    flash = modules.device == "cuda" and dtype == torch.bfloat16
    settings |= _recompute(spec, parallel, fused_attention=modules.transformer_engine or flash)
    settings |= _attention_extras(spec)
    if spec.moe is not None:
        settings |= _moe_settings(spec.moe, modules.transformer_engine)
    if spec.mla is not None:
        settings |= _mla_settings(spec)
    return settings


def _layout_fields(parallel: ParallelConfig) -> dict[str, Any]:
    """Return the fields of the parallel layout."""
    return {
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "virtual_pipeline_model_parallel_size": parallel.vpp if parallel.vpp > 1 else None,
        "num_layers_in_first_pipeline_stage": parallel.num_layers_first_stage,
        "num_layers_in_last_pipeline_stage": parallel.num_layers_last_stage,
        "pipeline_model_parallel_layout": parallel.pipeline_layout,
        "context_parallel_size": parallel.cp,
        "expert_model_parallel_size": parallel.ep,
        "expert_tensor_parallel_size": parallel.etp,
        "sequence_parallel": parallel.sequence_parallel,
    }


def _attention_extras(spec: ModelSpec) -> dict[str, Any]:
    """Return the fields that only gpt-oss needs: output bias, attention sinks and windows."""
    settings: dict[str, Any] = {}
    if spec.output_bias:
        settings["add_bias_linear"] = True
    if spec.attention_sinks:
        settings["softmax_type"] = "learnable"
    if any(spec.windowed):
        settings |= {
            "window_size": (spec.sliding_window - 1, 0),
            "window_attn_skip_freq": list(map(int, spec.windowed)),
        }
    return settings


def _fused_kernels(spec: ModelSpec, modules: ModuleChoice) -> dict[str, Any]:
    """Return the fields of the fused kernels, which are on with Transformer Engine.

    The gated unit and the residual sum are compiled by torch (fusions/fused_bias_swiglu.py, fused_bias_dropout.py). The
    linear layers of Transformer Engine add the gradient of a weight to the float32 buffer in the matrix product
    (extensions/transformer_engine.py:1037); the head needs no such kernel (megatron_patches/head_gradient.py). The
    fused permutation of routed tokens is Transformer Engine's, since 2.1. The clamped gate of gpt-oss has no kernel.
    """
    on, moe = modules.transformer_engine, spec.moe
    return {
        "gradient_accumulation_fusion": on,
        "bias_activation_fusion": on and (moe is None or moe.gate is None),
        "bias_dropout_fusion": on,
        "masked_softmax_fusion": False,  # of attention that is not fused
        "persist_layer_norm": False,  # of apex's norm, which no module here is
        **({"moe_permute_fusion": on} if moe is not None else {}),
    }


def _recompute(spec: ModelSpec, parallel: ParallelConfig, *, fused_attention: bool) -> dict[str, Any]:
    if parallel.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    modules = recomputed_modules(spec, parallel, fused_attention=fused_attention)
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)} if modules else {}


def _moe_settings(moe: MoeSpec, grouped: bool) -> dict[str, Any]:
    return {
        **expert_settings(moe),
        "num_moe_experts": moe.num_experts,
        "moe_layer_freq": [int(has_experts) for has_experts in moe.layers],
        "moe_grouped_gemm": grouped,
    }


def _mla_settings(spec: ModelSpec) -> dict[str, Any]:
    assert spec.mla is not None, "called for latent attention only"
    settings: dict[str, Any] = {
        "multi_latent_attention": True,
        "qk_layernorm": True,  # norms of the latent vectors
        **latent_settings(spec.mla),
        "rotary_base": spec.rope_theta,
        "rope_type": "rope",
        "mscale_all_dim": 0.0,  # does not scale the logits
    }
    if spec.rope is not None:
        settings |= {
            "rope_type": "yarn",
            "rotary_scaling_factor": spec.rope.factor,
            "original_max_position_embeddings": spec.rope.original_max_positions,
            "beta_fast": spec.rope.beta_fast,
            "beta_slow": spec.rope.beta_slow,
            "mscale_all_dim": spec.rope.mscale_all_dim,
        }
    return settings


def build_models(
    spec: ModelSpec,
    config: TransformerConfig,
    parallel: ParallelConfig,
    ranks: Ranks,
    model_type: type[PolicyModel] = PolicyModel,
) -> list[PolicyModel]:
    """Build the model chunks of this rank; interleaved pipelining has several. The weights must be loaded
    afterwards."""
    fixes.fit_to(spec)
    models = [model.to(ranks.device) for model in bare_models(spec, config, parallel, model_type)]
    cpu.install()  # for modules that were imported while the model was built
    for model in models:
        fixes.separate_experts(model)
        fixes.mark_shared_keys(model)
        for module in model.modules():
            _fit_module(module, spec)
    fixes.keep_after_build(config)
    return models


def bare_models(
    spec: ModelSpec, config: TransformerConfig, parallel: ParallelConfig, model_type: type[PolicyModel] = PolicyModel
) -> list[PolicyModel]:
    """Build Megatron's modules of this rank on the default device, without the changes that a forward pass needs."""
    return [_chunk(model_type, config, spec, parallel, chunk) for chunk in range(parallel.vpp)]


def _fit_module(module: torch.nn.Module, spec: ModelSpec) -> None:
    rotary = getattr(module, "rotary_pos_emb", None)
    if rotary is not None:
        set_frequencies(rotary, spec)
    for name in ("q_layernorm", "kv_layernorm"):
        if spec.mla is not None and hasattr(module, name):
            getattr(module, name).eps = spec.mla.latent_norm_eps


def _chunk(
    model_type: type[PolicyModel], config: TransformerConfig, spec: ModelSpec, parallel: ParallelConfig, chunk: int
) -> PolicyModel:
    """Build model chunk `chunk` of the `parallel.vpp` chunks of this rank."""
    stage = chunk if parallel.vpp > 1 else None
    with head_gradient.head_without_apex():
        return model_type(
            config,
            _layer_spec(config, spec, stage),
            vocab_size=padded_vocab(spec.vocab_size, parallel.tp),
            max_sequence_length=spec.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            parallel_output=True,
            share_embeddings_and_output_weights=spec.tie_embeddings,
            position_embedding_type="rope",
            rotary_percent=spec.rotary_fraction,
            rotary_base=spec.rope_theta,
            vp_stage=stage,
        )


def _layer_spec(config: TransformerConfig, spec: ModelSpec, vp_stage: int | None) -> Any:
    transformer_engine = config.transformer_impl == "transformer_engine"
    if not transformer_engine:
        # hard-coded in gpt_layer_specs.py (layers and final norm)
        gpt_layer_specs.LocalSpecProvider = PackedSpecProvider
        gpt_layer_specs.LNImpl = RMSNorm
    block = gpt_layer_specs.get_gpt_decoder_block_spec(
        config, use_transformer_engine=transformer_engine, normalization="RMSNorm", vp_stage=vp_stage
    )
    if spec.mla is not None and config.q_lora_rank is None:
        for layer in block.layer_specs:  # the builder sets a norm, which mla_qk_norm_config.py:173 rejects
            layer.submodules.self_attention.submodules.q_layernorm = IdentityOp
    if spec.moe is not None and spec.moe.gate is not None:
        experts = functools.partial(ClampedExperts, alpha=spec.moe.gate.alpha, limit=spec.moe.gate.limit)
        for layer in block.layer_specs:  # moe_module_specs.py:93: the builder of a layer's experts is an argument
            layer.submodules.mlp.keywords["submodules"].experts = experts
    return block
