"""Replacements of functions of Megatron-Core that are slow or fail without Transformer Engine, on every device.

Asserted by tests/unit/policy/megatron_patches/test_local_modules.py, and by test_local_modules_on_cuda.py beside its
folder.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from grpo_mega.parallel.context_parallel import rank_index
from grpo_mega.policy.megatron_patches import cpu

cpu.prepare_import()

from megatron.core.models.common.embeddings import rope_utils  # noqa: E402 - only after prepare_import
from megatron.core.tensor_parallel import random  # noqa: E402


def install() -> None:
    """Replace the functions. Idempotent."""
    # The unfused rotary embedding of packed rows loops over sequences in Python, for q and k in every layer: a row of
    # 500 short rollouts spends most of its forward pass there. Only Transformer Engine has a fused kernel for it.
    rope_utils._apply_rotary_pos_emb_thd = rotary_packed
    # random.py:693-696,787: a recomputed module reads the FP8 state even without Transformer Engine (:740)
    if not random.HAVE_TE:
        random.FP8GlobalStateManager = _NoFp8
        random.activation_recompute_forward = random.fp8_autocast = _null_context


def rotary_packed(
    t: Tensor,
    cu_seqlens: Tensor,
    freqs: Tensor,
    rotary_interleaved: bool = False,
    mla_rotary_interleaved: bool = False,
    mscale: float = 1.0,
    cp_group: Any = None,
) -> Tensor:
    """Apply the rotary embedding to this rank's tokens [T/cp, n, d] of a packed row with one gather of frequencies.

    The position of a token is its index in the row minus the start of its sequence.
    """
    total = t.size(0) * (cp_group.size() if cp_group is not None else 1)
    starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff(), output_size=total)
    positions = torch.arange(total, device=t.device) - starts
    if total != t.size(0):
        positions = positions[rank_index(cu_seqlens, cp_group.size(), cp_group.rank(), total)]
    rotated: Tensor = rope_utils._apply_rotary_pos_emb_bshd(
        t.unsqueeze(1),
        freqs[positions],
        rotary_interleaved=rotary_interleaved,
        mla_rotary_interleaved=mla_rotary_interleaved,
        mscale=mscale,
    )
    return rotated.squeeze(1)


class _NoFp8:
    """Stub of Transformer Engine's FP8GlobalStateManager."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def _null_context(*_: Any, **__: Any) -> contextlib.nullcontext[None]:
    return contextlib.nullcontext()
