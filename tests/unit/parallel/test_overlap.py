"""Defaults of the overlap of communication and computation."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_mega.config.policy_sections import ParallelConfig
from grpo_mega.parallel.overlap import with_overlap


@pytest.mark.parametrize(
    ("keys", "copies", "on_cuda", "expected"),
    [
        ({}, 4, True, (True, True)),
        ({}, 1, True, (False, False)),
        ({}, 4, False, (False, False)),
        ({"overlap_grad_reduce": False}, 4, True, (False, False)),
        ({"overlap_param_gather": False}, 4, True, (True, False)),
        ({"overlap_grad_reduce": True}, 4, False, (True, False)),
        ({"overlap_grad_reduce": True, "overlap_param_gather": True}, 1, False, (True, True)),
    ],
)
def test_null_is_on_with_cuda_and_several_copies(
    keys: dict[str, Any], copies: int, on_cuda: bool, expected: tuple[bool, bool]
) -> None:
    found = with_overlap(ParallelConfig(tp=2, **keys), copies=copies, on_cuda=on_cuda)
    assert (found.overlap_grad_reduce, found.overlap_param_gather) == expected
    assert found.tp == 2
