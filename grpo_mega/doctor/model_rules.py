"""Rules between config and model, checked before process groups are created or weights are read.

The rules of the layout are in models/layout_rules.py, those of the engine in engines/engine_rules.py.
"""

from __future__ import annotations

from pathlib import Path

from grpo_mega.config.schema import Config
from grpo_mega.engines.engine_rules import (
    check_engine_fp8,
    check_engine_fp8_device,
    check_engine_model,
    check_memory_share_device,
    check_server_addresses,
)
from grpo_mega.formats.stored_head import checkpoint_spec
from grpo_mega.models.layout_rules import check_layout
from grpo_mega.models.spec import ModelSpec
from grpo_mega.models.tiny_recipe import recipe_spec
from grpo_mega.parallel.devices import has_cuda_driver
from grpo_mega.parallel.topology import Topology
from grpo_mega.policy.module_choice import (
    INSTALL_TRANSFORMER_ENGINE,
    ModuleChoice,
    check_attention,
    choose_modules,
    transformer_engine_release,
)
from grpo_mega.types import UserError


def check_model(config: Config, topology: Topology, *, with_engine: bool = True) -> None:
    """Check that the layout divides the model, that a rollout fits its positions, and that the engine supports it.

    Args:
        config: the run.
        topology: its ranks.
        with_engine: False leaves out the rules of the engine.

    Raises:
        UserError: a rule is broken; the message names the key and the model's number.
    """
    where = "model.base.architecture" if config.model.base else str(config.model.path)
    _check_host_optimizer(config)
    _check_moments(config)
    _check_fp8_device(config)
    if with_engine:
        check_engine_fp8_device(config)
        if config.engine.placement == "colocated":  # engine servers check their own machine
            check_memory_share_device(config)
    spec = configured_spec(config)
    if with_engine:
        check_engine_model(spec, config)
        check_server_addresses(config)
    _check_start(config)
    if config.algorithm.routing_replay and spec.moe is None:
        raise UserError(f"algorithm.routing_replay=true has no effect: {where} has no experts", remedy="leave it out")
    if config.algorithm.aux_loss_coef and spec.moe is None:
        raise UserError(
            f"algorithm.aux_loss_coef={config.algorithm.aux_loss_coef} has no effect: {where} has no experts",
            remedy="leave it out",
        )
    _check_router_bias(spec, config.algorithm.router_bias_update_rate, where)
    _check_logit_bias(spec, config, where)
    check_layout(spec, config.parallel, topology, where)
    _check_fp8_layers(spec, config, where)
    modules = choose_modules(config)
    check_attention(spec, config, modules)
    _check_megatron_arguments(spec, config, modules)
    if with_engine:
        check_engine_fp8(spec, config, where, latent_split=not modules.transformer_engine)
    if config.is_sft and config.data.max_example_tokens > spec.max_positions:
        raise UserError(
            f"data.max_example_tokens={config.data.max_example_tokens} is more than the {spec.max_positions} positions "
            f"of {where}",
            remedy="lower it, and set data.overlong=skip or truncate if the examples are longer",
        )
    longest = config.longest_rollout
    if config.has_engine and longest > spec.max_positions:
        raise UserError(
            f"data.max_prompt_tokens + the largest max_tokens = {longest} is more than the {spec.max_positions} "
            f"positions of {where}",
            remedy="lower one of them",
        )
    rope = spec.rope
    if with_engine and rope is not None and rope.kind == "yarn" and longest > rope.original_max_positions * rope.factor:
        # Engines compute this many positions at their start, and read past the last one without an error.
        raise UserError(
            f"data.max_prompt_tokens + the largest max_tokens = {longest} is more than "
            f"original_max_position_embeddings x factor = {rope.original_max_positions} x {rope.factor:g} of {where}, "
            "and engines have no positions beyond them",
            remedy="lower one of the keys",
        )


def _check_start(config: Config) -> None:
    """Raise UserError if `model.checkpoint` is not a checkpoint. Its tensors are checked when they are loaded."""
    named = config.model.checkpoint
    if named is not None and not (Path(named) / ".metadata").is_file():
        raise UserError(
            f"model.checkpoint={named} is not a checkpoint of a run (a folder with the file .metadata)",
            remedy="use RUN/checkpoints/step_NNNNNN, or model.path for a Hugging Face folder",
        )


def _check_router_bias(spec: ModelSpec, rate: float, where: str) -> None:
    """Raise UserError if a rate is set for a model whose routers have no correction bias."""
    if rate and (spec.moe is None or not spec.moe.correction_bias):
        missing = "has no experts" if spec.moe is None else "has routers without a correction bias"
        raise UserError(
            f"algorithm.router_bias_update_rate={rate} has no effect: {where} {missing}", remedy="leave it out"
        )


def _check_logit_bias(spec: ModelSpec, config: Config, where: str) -> None:
    """Raise UserError if evaluation.logit_bias names a token that the model does not have."""
    for token in config.evaluation.logit_bias:
        if not 0 <= token < spec.vocab_size:
            raise UserError(
                f"evaluation.logit_bias={dict(config.evaluation.logit_bias)}: {token} is not a token id of {where}, "
                f"whose vocabulary has {spec.vocab_size} tokens",
                remedy=f"use ids from 0 to {spec.vocab_size - 1}",
            )


def _check_megatron_arguments(spec: ModelSpec, config: Config, modules: ModuleChoice) -> None:
    """Raise UserError if Megatron would not accept the fields of `parallel.megatron`."""
    if config.parallel.megatron:
        from grpo_mega.policy.transformer_config import transformer_config  # imports Megatron: seconds

        transformer_config(spec, config.parallel, config.precision, modules)


def _check_host_optimizer(config: Config) -> None:
    """Raise UserError if optimizer.host_fraction is set without a CUDA device."""
    if config.optimizer.host_fraction > 0 and not has_cuda_driver():
        raise UserError(
            f"optimizer.host_fraction={config.optimizer.host_fraction} needs CUDA devices, and this machine has none",
            remedy="leave it out",
        )


def _check_moments(config: Config) -> None:
    """Raise UserError if optimizer.moments=bf16 is set without a CUDA device or Transformer Engine."""
    moments = config.optimizer.moments
    if moments == "fp32":
        return
    if not has_cuda_driver():
        raise UserError(
            f"optimizer.moments={moments} needs CUDA devices, and this machine has none",
            remedy="set optimizer.moments=fp32",
        )
    if transformer_engine_release() is None:
        raise UserError(
            f"optimizer.moments={moments} needs the Adam of Transformer Engine, which is not installed",
            remedy=f"{INSTALL_TRANSFORMER_ENGINE}, or set optimizer.moments=fp32",
        )


def _check_fp8_device(config: Config) -> None:
    """Raise UserError if precision.fp8 is set without a CUDA device."""
    if config.precision.fp8 is not None and not has_cuda_driver():
        raise UserError(
            f"precision.fp8.recipe={config.precision.fp8.recipe} needs CUDA devices, and this machine has none",
            remedy="leave precision.fp8 out",
        )


def _check_fp8_layers(spec: ModelSpec, config: Config, where: str) -> None:
    """Check that the layers that stay in bf16 are within the first and the last stage, as Megatron requires."""
    fp8, stage = config.precision.fp8, spec.num_layers // config.parallel.pp
    if fp8 is None:
        return
    for key, number in (("first_layers_bf16", fp8.first_layers_bf16), ("last_layers_bf16", fp8.last_layers_bf16)):
        if number > stage:
            raise UserError(
                f"precision.fp8.{key}={number} is more than the {stage} layers of a pipeline stage of {where}",
                remedy=f"use at most {stage}",
            )


def configured_spec(config: Config) -> ModelSpec:
    """Return the spec of the checkpoint, or of the recipe of the tiny base.

    Raises:
        UserError: `model.path` is not a folder of a supported model.
    """
    if config.model.base is not None:
        return recipe_spec(config.model.base.architecture)
    folder = config.model.folder
    if not folder.is_dir():
        raise UserError(
            f"model.path={folder} is not a folder",
            remedy="use a Hugging Face model folder, or the name of a model on the hub, as in Qwen/Qwen2.5-7B-Instruct",
        )
    return checkpoint_spec(folder)
