"""`exact`: equality after stripping, nothing else."""

from __future__ import annotations

import pytest

from grpo_mega.rewards.builtin.exact import exact


@pytest.mark.parametrize("completion", ["72", " 72", "72\n", "\t72 "])
def test_white_space_at_the_ends_does_not_matter(completion: str) -> None:
    assert exact("40+32=", completion, "72") == 1.0


@pytest.mark.parametrize("completion", ["", "7", "7 2", "072", "72.", "72.0", "+72", "73"])
def test_any_other_difference_is_zero(completion: str) -> None:
    assert exact("40+32=", completion, "72") == 0.0
