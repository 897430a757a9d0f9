"""FP8 metrics of an update, read from the state of Transformer Engine's layers.

The delayed recipe keeps a history of the largest absolute values of weights, inputs and gradients. The other recipes
compute a scale from the tensor itself, so nothing is clipped. They keep the quantized values and scales of a weight,
and nothing of inputs and gradients. A value that is too small compared with the largest of its block is quantized to 0.

Names and layouts are asserted against Transformer Engine's source by tests/unit/config/test_fp8_rules.py, the numbers
by tests/unit/policy/test_fp8_scales.py. Not yet verified on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from grpo_mega.config.policy_sections import Fp8Config

_MAGNITUDE = 0x7F  # all bits of an e4m3 value but the sign


@dataclass(frozen=True)
class WeightCodes:
    """A weight in e4m3, the type of the forward pass in either format.

    codes: quantized values, uint8 [R, C].
    scales: factor of each block, float32 or uint8 exponents of 2 with bias 127, padded at the end of both dimensions.
    block: (rows, columns) of a block; (R, C) for one scale per tensor.
    """

    codes: Tensor
    scales: Tensor
    block: tuple[int, int]

    def largest(self) -> Tensor:
        """Return the largest absolute dequantized value, a float64 scalar."""
        rows, columns = self.block
        magnitude = self.codes & _MAGNITUDE
        if self.codes.shape[0] % rows or self.codes.shape[1] % columns:
            magnitude = F.pad(magnitude, (0, -magnitude.shape[1] % columns, 0, -magnitude.shape[0] % rows))
        down, across = magnitude.shape[0] // rows, magnitude.shape[1] // columns
        of_block = magnitude.view(down, rows, across, columns).amax((1, 3))  # e4m3 bits have the order of the values
        scales = self.scales.view(-1, self.scales.shape[-1])[:down, :across].double()
        if self.scales.dtype == torch.uint8:
            scales = torch.exp2(scales - 127)
        return (of_block.view(torch.float8_e4m3fn).double() * scales).amax()

    def zeros(self) -> Tensor:
        """Return the number of values quantized to 0 or -0."""
        return ((self.codes & _MAGNITUDE) == 0).sum()


def weight_codes(model: Iterable[torch.nn.Module]) -> Iterator[WeightCodes]:
    """Yield each weight that a pass used in FP8: the parameter itself, or the copy that its layer keeps.

    Copies: Transformer Engine 2.x, module/base.py, `get_weight_workspace`.
    """
    for module in (each for chunk in model for each in chunk.modules()):
        for weight in (*module.parameters(recurse=False), *getattr(module, "_fp8_workspaces", {}).values()):
            if hasattr(weight, "_scale_inv"):
                codes = weight._data if weight._data is not None else weight._transpose
                codes = codes.view(-1, codes.shape[-1])
                yield WeightCodes(codes, weight._scale_inv, (codes.shape[0], codes.shape[1]))
            elif hasattr(weight, "_rowwise_scale_inv"):
                yield _of_blocks(weight)


def _of_blocks(weight: Any) -> WeightCodes:
    """Return a weight with blocks of 128 x 128 (float32 scales), or of 32 along the contracted dimension (MXFP8).

    Either order of a weight can be read. `_columnwise_data` is transposed with 128 x 128 blocks, but not with MXFP8.
    """
    by_row = weight._rowwise_data is not None
    codes = weight._rowwise_data if by_row else weight._columnwise_data
    scales = weight._rowwise_scale_inv if by_row else weight._columnwise_scale_inv
    block = (128, 128) if scales.dtype != torch.uint8 else (1, 32) if by_row else (32, 1)
    return WeightCodes(codes.view(-1, codes.shape[-1]), scales, block)


def weight_range(model: Iterable[torch.nn.Module]) -> Tensor:
    """Return float64 [3]: largest absolute FP8 weight, number of FP8 weights that are 0, number of FP8 weights."""
    found = torch.zeros(3, dtype=torch.float64, device="cpu")
    for weight in weight_codes(model):
        found[0] = max(float(found[0]), float(weight.largest()))
        found[1] += int(weight.zeros())
        found[2] += weight.codes.numel()
    return found


def delayed_scales(model: Iterable[torch.nn.Module], fp8: Fp8Config, passes: int) -> Tensor:
    """Return statistics of the delayed recipe over the last `passes` passes.

    float64 [3]: largest absolute value of any tensor, number of tensors that were clipped in a pass, number of tensors.

    A scale comes from the largest value of earlier passes (1 before the first), so a tensor is clipped when its largest
    value exceeds the earlier ones. `amax_history` [H, tensors] has the newest pass in its last row and the next
    pass in its first (Transformer Engine 2.x, quantization.py: `_update_amax_history`).
    """
    largest = {"scaling_fwd": 448.0, "scaling_bwd": 57344.0 if fp8.format in (None, "hybrid") else 448.0}
    found = torch.zeros(3, dtype=torch.float64, device="cpu")
    for module in (each for chunk in model for each in chunk.modules()):
        for key, limit in largest.items():
            state = getattr(module, "fp8_meta", {}).get(key)
            if state is not None and state.amax_history.shape[0] > 1:
                _add_history(found, state.amax_history[1:].detach().cpu().double(), limit, passes)
    return found


def _add_history(found: Tensor, rows: Tensor, limit: float, passes: int) -> None:
    """Add the statistics of `rows` [passes, tensors], oldest first; 0 where a pass did not use the tensor."""
    before = torch.cat([torch.zeros_like(rows[:1]), rows.cummax(0).values[:-1]])
    before = torch.where(before > 0, before, torch.full_like(before, limit))
    new, before = rows[-passes:], before[-passes:]
    found[0] = max(float(found[0]), float(new.max()))
    found[1] += (new > before).sum()
    found[2] += (new > 0).sum()


def reported_scales(
    models: Sequence[torch.nn.Module], fp8: Fp8Config, passes: int, device: torch.device
) -> tuple[dict[str, float], dict[str, float]]:
    """Return (means, maxima) over all ranks for `UpdateStats`, after the passes of an update. Collective.

    `fp8_amax`: largest absolute value of any tensor (delayed recipe) or of weights (other recipes). `fp8_cut`: fraction
    of tensors that were clipped in a pass; only for the delayed recipe, as it is always 0 for the others. `fp8_zero`:
    fraction of FP8 weights that are quantized to 0. Metrics without data are absent.
    """
    weights = weight_range(models)
    delayed = delayed_scales(models, fp8, passes) if fp8.recipe == "delayed" else torch.zeros_like(weights)
    largest = torch.maximum(weights[:1], delayed[:1]).to(device)
    counts = torch.cat([weights[1:], delayed[1:]]).to(device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    dist.all_reduce(counts)
    zeros, codes, cut, tensors = counts.tolist()
    means = {"fp8_zero": zeros / codes} if codes else {}
    if tensors:
        means["fp8_cut"] = cut / tensors
    return means, {"fp8_amax": float(largest)} if means else {}
