"""Records of chosen experts as small integers: [N, L, K] of N tokens, L layers, K experts of each. Pure.

In hand and on disk a record is uint8, 255 for a token without a record, or int16, -1 for one, where the numbers of the
experts need it; in a row it is int16. The rows of layers without experts mean nothing.
Asserted by tests/unit/data/test_expert_records.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

NO_RECORD_UINT8 = 255


def narrowed(choices: Tensor, num_experts: int) -> Tensor:
    """[N, L, K] integers, -1 without a record -> the smallest form for `num_experts` experts."""
    if num_experts > NO_RECORD_UINT8:
        return choices.to(torch.int16)
    return torch.where(choices < 0, NO_RECORD_UINT8, choices).to(torch.uint8)


def widened(choices: Tensor) -> Tensor:
    """A record in either form -> int16, -1 without a record."""
    if choices.dtype != torch.uint8:
        return choices.to(torch.int16)
    wide = choices.to(torch.int16)
    return torch.where(wide == NO_RECORD_UINT8, -1, wide)
