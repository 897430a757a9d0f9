"""Combinations of FP8 recipes, GPU generations and other config keys that are supported.

Needs neither torch nor Transformer Engine, so that a wrong combination is rejected on any machine. Names and numbers
are checked against the source of Transformer Engine (tests/unit/config/test_fp8_rules.py). Not yet verified on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo_mega.config.schema import Config
from grpo_mega.types import UserError

Capability = tuple[int, int]


@dataclass(frozen=True)
class Recipe:
    """An FP8 recipe: granularity and source of the scales.

    te_class: class in transformer_engine.common.recipe.
    least, below: range of compute capabilities with this recipe, `below` excluded.
    cuda: lowest CUDA version.
    default_format: `precision.fp8.format` if it is null.
    token_multiple: the tokens of a matrix product on a rank must be a multiple of it.
    layers_differ: True if some layers may stay in bf16.
    """

    te_class: str
    least: Capability
    below: Capability
    cuda: Capability
    default_format: str
    token_multiple: int
    layers_differ: bool


_NO_UPPER_BOUND = (99, 0)
ENGINE_LEAST: Capability = (8, 9)
"""Lowest compute capability of the Triton kernels for FP8 blocks in vLLM."""

RECIPES = {
    # one scale per tensor, from the largest absolute value of earlier steps
    "delayed": Recipe("DelayedScaling", (8, 9), _NO_UPPER_BOUND, (12, 1), "hybrid", 16, False),
    # one scale per tensor, from its own largest absolute value
    "tensorwise": Recipe("Float8CurrentScaling", (8, 9), _NO_UPPER_BOUND, (12, 1), "hybrid", 16, True),
    # one scale per 1 x 128 activations or gradients and per 128 x 128 weights, as in DeepSeek-V3
    "blockwise": Recipe("Float8BlockScaling", (9, 0), _NO_UPPER_BOUND, (12, 9), "e4m3", 16, True),
    # one power-of-two scale per 1 x 32 values, in the tensor cores of Blackwell
    "mxfp8": Recipe("MXFP8BlockScaling", (10, 0), (12, 0), (12, 8), "e4m3", 32, True),
}

GENERATIONS = {(8, 9): "L40S, RTX 4090", (9, 0): "H100, H200, H20", (10, 0): "B200", (12, 0): "RTX 5090"}


def check_fp8(config: Config) -> None:
    """Check the rules between `precision.fp8` and other keys.

    Raises:
        UserError: for the first broken rule.
    """
    fp8 = config.precision.fp8
    if fp8 is None:
        return
    recipe = RECIPES[fp8.recipe]
    if config.precision.dtype != "bf16":
        raise UserError(
            f"precision.dtype={config.precision.dtype} is not supported with precision.fp8: tensors that are not FP8 "
            "are bf16",
            remedy="set precision.dtype=bf16, or remove precision.fp8",
        )
    if config.policy.modules == "local":
        raise UserError(
            f"precision.fp8.recipe={fp8.recipe} is not supported with policy.modules=local: only Transformer Engine "
            "has FP8 matrix products",
            remedy="set policy.modules=auto or transformer_engine, or remove precision.fp8",
        )
    if not recipe.layers_differ:
        for key, number in (("first_layers_bf16", fp8.first_layers_bf16), ("last_layers_bf16", fp8.last_layers_bf16)):
            if number:
                raise UserError(
                    f"precision.fp8.{key}={number} is not supported with precision.fp8.recipe={fp8.recipe}: its "
                    "scales are reduced over all layers at once",
                    remedy=f"set precision.fp8.{key}=0, or use another recipe",
                )
        not_recomputable = {"layernorm", "moe_act"} & set(config.parallel.recompute_modules or ())
        if not_recomputable:
            raise UserError(
                f"parallel.recompute_modules must not hold {sorted(not_recomputable)[0]} with "
                f"precision.fp8.recipe={fp8.recipe}, which cannot recompute it",
                remedy="remove the module, or use another recipe",
            )
    if fp8.recipe != "delayed" and fp8.amax_history is not None:
        raise UserError(
            f"precision.fp8.amax_history={fp8.amax_history} does nothing with precision.fp8.recipe={fp8.recipe}, which "
            "uses no earlier step",
            remedy="remove precision.fp8.amax_history",
        )
    if fp8.params:
        _check_params(config)


def _check_params(config: Config) -> None:
    """Check the rules for weights that are stored in FP8."""
    if config.needs_reference:
        raise UserError(
            f"precision.fp8.params=true is not supported with algorithm.kl_coef={config.algorithm.kl_coef}: the swap "
            "of the reference copies whole buffers, without the scales of FP8 weights",
            remedy="set algorithm.kl_coef=0, or precision.fp8.params=false",
        )
    if config.optimizer.host_fraction > 0:
        raise UserError(
            "precision.fp8.params=true is not supported with "
            f"optimizer.host_fraction={config.optimizer.host_fraction}: the optimizer on the host cannot write FP8 "
            "weights",
            remedy="remove one of the two keys",
        )


def check_generation(recipe: str, capability: Capability, cuda: Capability | None = None) -> UserError | None:
    """Return the reason why a GPU cannot compute with this recipe, or None if it can.

    Args:
        recipe: the name of the recipe.
        capability: compute capability of the GPU.
        cuda: the CUDA version that torch is built for; None: not checked.
    """
    needed = RECIPES[recipe]
    kinds = ", ".join(name for at, name in GENERATIONS.items() if needed.least <= at < needed.below)
    if not needed.least <= capability < needed.below:
        does = ", ".join(name for name, r in RECIPES.items() if r.least <= capability < r.below) or "none, use bf16"
        return UserError(
            f"precision.fp8.recipe={recipe} is supported on {kinds}, and this GPU has compute capability "
            f"{capability[0]}.{capability[1]}",
            remedy=f"use a recipe that it supports: {does}",
        )
    if cuda is not None and cuda < needed.cuda:
        return UserError(
            f"precision.fp8.recipe={recipe} needs CUDA {needed.cuda[0]}.{needed.cuda[1]} or later, and torch is built "
            f"for {cuda[0]}.{cuda[1]}",
            remedy="use a newer build, or another recipe",
        )
    return None


def check_engine_generation(capability: Capability) -> UserError | None:
    """Return the reason why an engine cannot compute in FP8 (engine.fp8) on a GPU, or None if it can."""
    if capability >= ENGINE_LEAST:
        return None
    kinds = ", ".join(GENERATIONS.values())
    return UserError(
        f"engine.fp8 needs a GPU with FP8 ({kinds}), and this one has compute capability {capability[0]}."
        f"{capability[1]}",
        remedy="remove engine.fp8",
    )
