"""The two types of a routing record."""

from __future__ import annotations

import pytest
import torch

from grpo_mega.data.expert_records import narrow_record, widen_record


@pytest.mark.parametrize(("num_experts", "dtype"), [(8, torch.uint8), (255, torch.uint8), (256, torch.int16)])
def test_experts_and_missing_records_are_kept_by_the_smallest_type(num_experts: int, dtype: torch.dtype) -> None:
    choices = torch.tensor([0, 1, num_experts - 1, -1], dtype=torch.int64).view(2, 1, 2)
    small = narrow_record(choices, num_experts)
    assert small.dtype == dtype
    assert widen_record(small).dtype == torch.int16
    assert torch.equal(widen_record(small).long(), choices)
