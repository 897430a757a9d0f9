"""Routing records of experts as small integers: [N, L, K] for N tokens, L layers and K chosen experts per token.

In a rollout and on disk a record is uint8, with 255 for a token without a record. If there are too many experts for
that, it is int16 with -1. In a packed row it is int16. Values of layers without experts have no meaning.
Asserted by tests/unit/data/test_expert_records.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NO_RECORD_UINT8 = 255


def narrow_record(choices: Tensor, num_experts: int) -> Tensor:
    """Convert [N, L, K] integers, -1 for no record, to the smallest type for `num_experts` experts."""
    if num_experts > NO_RECORD_UINT8:
        return choices.to(torch.int16)
    return torch.where(choices < 0, NO_RECORD_UINT8, choices).to(torch.uint8)


def widen_record(choices: Tensor) -> Tensor:
    """Convert a record of either type to int16, with -1 for no record."""
    if choices.dtype != torch.uint8:
        return choices.to(torch.int16)
    wide = choices.to(torch.int16)
    return torch.where(wide == NO_RECORD_UINT8, -1, wide)


def has_record(choices: NDArray[Any]) -> NDArray[np.bool_]:
    """Return [N]: True for tokens of a record [N, L, K] of either type that have a record in any layer."""
    known = choices != NO_RECORD_UINT8 if choices.dtype == np.uint8 else choices >= 0
    return np.asarray(known.reshape(len(choices), -1).any(axis=1))
