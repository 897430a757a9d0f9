"""What goes together in FP8: recipes of Transformer Engine, generations of GPUs, and our other keys.

A table without torch and without Transformer Engine, so that a wrong combination is refused on any machine. Its names
and numbers are checked against Transformer Engine's own source (tests/unit/config/test_fp8_rules.py). Never run on a
GPU so far: unproven.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo_mega.config.schema import Config
from grpo_mega.types import UserError

Capability = tuple[int, int]


@dataclass(frozen=True)
class Recipe:
    """How FP8 numbers get their scales.

    `te_class`: of transformer_engine.common.recipe. `least`, `below`: compute capabilities that have it. `cuda`: the
    least version. `token_multiple`: of the tokens that a rank's matrix products see. `layers_differ`: whether some
    layers may stay in bf16.
    """

    te_class: str
    least: Capability
    below: Capability
    cuda: Capability
    default_format: str
    token_multiple: int
    layers_differ: bool


_NONE_YET = (99, 0)
ENGINE_LEAST: Capability = (8, 9)
"""Of Triton's kernels for FP8 blocks in vLLM."""

RECIPES = {
    # one scale for a tensor, from the largest value of earlier steps
    "delayed": Recipe("DelayedScaling", (8, 9), _NONE_YET, (12, 1), "hybrid", 16, False),
    # one scale for a tensor, from its own largest value
    "tensorwise": Recipe("Float8CurrentScaling", (8, 9), _NONE_YET, (12, 1), "hybrid", 16, True),
    # 1 x 128 for activations and gradients, 128 x 128 for weights, as DeepSeek-V3 was trained
    "blockwise": Recipe("Float8BlockScaling", (9, 0), _NONE_YET, (12, 9), "e4m3", 16, True),
    # 1 x 32, with scales that are powers of 2, in the tensor cores of Blackwell
    "mxfp8": Recipe("MXFP8BlockScaling", (10, 0), (12, 0), (12, 8), "e4m3", 32, True),
}

GENERATIONS = {(8, 9): "L40S, RTX 4090", (9, 0): "H100, H200, H20", (10, 0): "B200", (12, 0): "RTX 5090"}


def check_fp8(config: Config) -> None:
    """Rules between keys.

    Raises:
        UserError: the first broken one.
    """
    fp8 = config.precision.fp8
    if fp8 is None:
        return
    recipe = RECIPES[fp8.recipe]
    if config.precision.dtype != "bf16":
        raise UserError(
            f"precision.fp8 needs precision.dtype=bf16, not {config.precision.dtype}: what is not FP8 is bf16",
            remedy="set it",
        )
    if not recipe.layers_differ:
        for key, number in (("first_layers_bf16", fp8.first_layers_bf16), ("last_layers_bf16", fp8.last_layers_bf16)):
            if number:
                raise UserError(
                    f"precision.fp8.{key}={number} with recipe={fp8.recipe}: its scales are reduced over all layers at "
                    "once",
                    remedy="use another recipe, or 0",
                )
        again = {"layernorm", "moe_act"} & set(config.parallel.recompute_modules or ())
        if again:
            raise UserError(
                f"parallel.recompute_modules holds {sorted(again)[0]}, which precision.fp8.recipe={fp8.recipe} cannot "
                "compute again",
                remedy="use another recipe, or leave it out",
            )
    if fp8.recipe != "delayed" and fp8.amax_history is not None:
        raise UserError(
            f"precision.fp8.amax_history={fp8.amax_history} does nothing with recipe={fp8.recipe}, which looks at no "
            "earlier step",
            remedy="leave it out",
        )
    if fp8.params:
        _check_params(config)


def _check_params(config: Config) -> None:
    """Weights that are held in FP8."""
    if config.algorithm.needs_reference:
        raise UserError(
            f"precision.fp8.params=true with algorithm.kl_coef={config.algorithm.kl_coef}: the reference is swapped in "
            "as whole buffers, without the scales of FP8 weights",
            remedy="set algorithm.kl_coef=0, or params=false",
        )
    if config.optimizer.host_fraction > 0:
        raise UserError(
            f"precision.fp8.params=true with optimizer.host_fraction={config.optimizer.host_fraction}: the optimizer "
            "on the host cannot write FP8 weights",
            remedy="leave one of them out",
        )


def check_generation(recipe: str, capability: Capability, cuda: Capability | None = None) -> str:
    """Why a GPU cannot compute with this recipe; empty: it can.

    Args:
        recipe: its name.
        capability: of the device.
        cuda: the version that torch is built for; None: not looked at.
    """
    needed = RECIPES[recipe]
    kinds = ", ".join(name for at, name in GENERATIONS.items() if needed.least <= at < needed.below)
    if not needed.least <= capability < needed.below:
        does = ", ".join(name for name, r in RECIPES.items() if r.least <= capability < r.below) or "none: use bf16"
        return (
            f"precision.fp8.recipe={recipe} runs on {kinds}, and this GPU has compute capability "
            f"{capability[0]}.{capability[1]}; recipes that it has: {does}"
        )
    if cuda is not None and cuda < needed.cuda:
        return (
            f"precision.fp8.recipe={recipe} needs CUDA {needed.cuda[0]}.{needed.cuda[1]} or later, and torch is built "
            f"for {cuda[0]}.{cuda[1]}; use a newer build, or another recipe"
        )
    return ""


def check_engine_generation(capability: Capability) -> str:
    """Why an engine cannot compute with FP8 codes on a GPU; empty: it can (engine.fp8)."""
    if capability >= ENGINE_LEAST:
        return ""
    kinds = ", ".join(GENERATIONS.values())
    return (
        f"engine.fp8 needs a GPU with FP8, as {kinds}, and this one has compute capability {capability[0]}."
        f"{capability[1]}; leave engine.fp8 out"
    )
