"""Routed experts with a clamped gate and biases (gpt-oss). As in the checkpoint, one parameter holds all of a rank.

Megatron's own experts do not support alpha of the gate, and stack gate and up projections, which alternate here. The
module takes the arguments of Megatron's expert modules. Asserted by tests/parallel/test_families.py (gpt-oss).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_mega.policy.megatron_patches import cpu
from grpo_mega.policy.modules.allocation import allocation_device

cpu.prepare_import()

from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes  # noqa: E402 - only after prepare_import
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint  # noqa: E402


class StackedLinear(torch.nn.Module):
    """weight [E, in, out] and bias [E, out] of a rank's E experts."""

    def __init__(self, num_experts: int, width: int, out: int, config: TransformerConfig) -> None:
        super().__init__()
        dtype, device = config.params_dtype, allocation_device(config)
        self.weight = torch.nn.Parameter(torch.empty(num_experts, width, out, dtype=dtype, device=device))
        self.bias = torch.nn.Parameter(torch.empty(num_experts, out, dtype=dtype, device=device))
        for parameter in (self.weight, self.bias):
            # other ranks hold other experts, so the gradient norm counts each once, as it does for shards
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)


class ClampedExperts(MegatronModule):
    """out = probability * (((up + 1) gate sigmoid(alpha gate)) W_down + b_down), gate and up clamped by `limit`."""

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, *, alpha: float, limit: float,
        pg_collection: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        super().__init__(config=config)
        hidden, width = config.hidden_size, config.moe_ffn_hidden_size
        assert width is not None, "a config with experts has moe_ffn_hidden_size"
        self.gate_up = StackedLinear(num_local_experts, hidden, 2 * width, config)
        self.down = StackedLinear(num_local_experts, width, hidden, config)
        self._alpha, self._limit = alpha, limit
        self._groups = {"tp_group": pg_collection.ep, "dp_cp_group": pg_collection.expt_dp}

    def forward(self, hidden: Tensor, tokens_per_expert: Tensor, probabilities: Tensor) -> tuple[Tensor, None]:
        """Return [T, H]. `hidden` [T, H] is sorted by expert; `probabilities` [T] are the router weights."""
        counts = tokens_per_expert.tolist()
        weights = (x.unbind() for x in (self.gate_up.weight, self.gate_up.bias, self.down.weight, self.down.bias))
        outputs = [
            ((self._gated(tokens @ w_up + b_up) @ w_down + b_down) * chosen[:, None]).to(hidden.dtype)
            for tokens, chosen, w_up, b_up, w_down, b_down in zip(
                hidden.split(counts), probabilities.split(counts), *weights, strict=True
            )
        ]
        return torch.cat(outputs), None

    def _gated(self, both: Tensor) -> Tensor:
        gate, up = both[..., ::2].clamp(max=self._limit), both[..., 1::2].clamp(-self._limit, self._limit)
        return (up + 1) * gate * torch.sigmoid(self._alpha * gate)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return sharded tensors of all experts; this rank holds some of their rows."""
        del metadata
        state = self.state_dict(prefix="", keep_vars=True)
        found: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            state, prefix, dict.fromkeys(state, 0), sharded_offsets, **self._groups
        )
        return found
