"""FP8 fields of Megatron's configs, and conversion of weights that are stored in FP8.

Not yet verified on a GPU. The parts that need none are asserted by tests/unit/policy/test_fp8.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from grpo_mega.config.fp8_rules import RECIPES
from grpo_mega.config.policy_sections import PrecisionConfig
from grpo_mega.policy.megatron_patches import cpu

cpu.prepare_import()

from megatron.core import fp8_utils  # noqa: E402 - only after prepare_import

_DEFAULT_HISTORY = 1024  # steps, Transformer Engine's own default for the delayed recipe


def transformer_fields(precision: PrecisionConfig, *, has_experts: bool) -> dict[str, Any]:
    """Return the FP8 fields of Megatron's TransformerConfig."""
    fp8 = precision.fp8
    if fp8 is None:
        return {}
    recipe = RECIPES[fp8.recipe]
    fields: dict[str, Any] = {
        "fp8": fp8.format or recipe.default_format,
        "fp8_recipe": fp8.recipe,
        "fp8_param": fp8.params,
    }
    if fp8.recipe == "delayed":
        fields |= {
            "fp8_amax_history_len": fp8.amax_history or _DEFAULT_HISTORY,
            "fp8_amax_compute_algo": "max",
        }
    if fp8.first_layers_bf16 or fp8.last_layers_bf16:
        fields |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": fp8.first_layers_bf16,
            "num_layers_at_end_in_bf16": fp8.last_layers_bf16,
        }
    if has_experts:  # FP8 matrix products need a multiple of tokens, and the number of tokens of an expert varies
        fields["moe_router_padding_for_quantization"] = True
    return fields


def ddp_fields(precision: PrecisionConfig) -> dict[str, Any]:
    """Return the FP8 fields of Megatron's DistributedDataParallelConfig: FP8 weights are gathered in FP8."""
    return {"fp8_param_gather": True} if precision.fp8 is not None and precision.fp8.params else {}


def optimizer_fields(precision: PrecisionConfig) -> dict[str, Any]:
    """Return the FP8 fields of Megatron's OptimizerConfig. Master weights and moments stay fp32."""
    fp8 = precision.fp8
    return {"fp8_recipe": fp8.recipe} if fp8 is not None and fp8.params else {}


def forget_copies(model: Iterable[torch.nn.Module]) -> None:
    """Free the FP8 copies that Transformer Engine's layers keep beside their weights; the next pass makes them again.

    Copies of bf16 weights are in the modules (module/base.py of 2.x: `get_weight_workspace`). A weight that is stored
    in FP8 has a second copy in the order of its columns, which its backward pass makes from the rows
    (`update_usage` in tensor/storage/). That of MXFP8 cannot be made from the rows, so it stays.
    """
    for chunk in model:
        for module in chunk.modules():
            copies = getattr(module, "_fp8_workspaces", None)
            if copies is not None:
                copies.clear()
        for parameter in chunk.parameters():
            if _can_transpose_again(parameter):
                parameter.update_usage(rowwise_usage=True, columnwise_usage=False)  # type: ignore[attr-defined]


def _can_transpose_again(parameter: Any) -> bool:
    """Return True if the parameter is stored in FP8 by rows, from which Transformer Engine can make the columns."""
    if hasattr(parameter, "_transpose"):  # Float8Tensor
        return parameter._data is not None
    return getattr(parameter, "_is_2D_scaled", False) and parameter._rowwise_data is not None  # Float8BlockwiseQTensor


def values_of(parameter: Tensor) -> Tensor:
    """Return the values of a parameter: the parameter itself, or its dequantized FP8 values in a new tensor."""
    if fp8_utils.is_float8tensor(parameter):
        values: Tensor = fp8_utils.dequantize_fp8_tensor(parameter)
        return values.detach()
    return parameter.data


def room_for(parameter: Tensor) -> Tensor:
    """Return zeros to fill with values: the parameter itself, or a bf16 tensor for `put` if it is stored in FP8."""
    if fp8_utils.is_float8tensor(parameter):
        return torch.zeros(parameter.shape, dtype=torch.bfloat16, device=parameter.device)
    parameter.zero_()
    return parameter


def put(values: Tensor, parameter: Tensor) -> None:
    """Set the parameter to the values in the tensor of `room_for`. An FP8 parameter quantizes them."""
    if values is not parameter:
        parameter.copy_(values)
