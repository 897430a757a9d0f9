"""Sources of lengths: quantiles, groups of one prompt, the limit, and what is not a length."""

from __future__ import annotations

import math

import numpy as np
import pytest

from grpo_mega.planner.simulation.lengths import lognormal_lengths, text_lengths
from grpo_mega.types import UserError


def test_lognormal_lengths_have_the_median_and_the_spread_that_were_given() -> None:
    found = lognormal_lengths("lognormal:6.0,0.8", 100_000).summary()
    assert found.p50 == pytest.approx(math.exp(6.0), rel=0.02)
    assert found.p99 == pytest.approx(math.exp(6.0 + 0.8 * 2.326), rel=0.05)
    assert found.cut_fraction == 0.0
    cut = lognormal_lengths("lognormal:6.0,0.8", 403).summary()  # the median
    assert cut.cut_fraction == pytest.approx(0.5, abs=0.01)
    assert cut.p99 == 403


def test_a_file_with_one_length_per_line_is_one_source() -> None:
    lengths = text_lengths("f", "5\n\n9\n700\n", 100)
    drawn = lengths.draw(np.random.default_rng(0), 200, 4)
    assert drawn.shape == (200, 4)
    assert set(np.unique(drawn)) == {5, 9, 100}
    assert len({tuple(row) for row in drawn.tolist()}) > 3  # the answers of a group are independent
    assert lengths.summary().mean == pytest.approx((5 + 9 + 100) / 3)


def test_the_lengths_of_one_line_are_those_of_one_prompt() -> None:
    drawn = text_lengths("f", "1 2 3\n40, 50, 60\n", 100).draw(np.random.default_rng(0), 50, 3)
    assert {tuple(sorted(row)) for row in drawn.tolist()} == {(1, 2, 3), (40, 50, 60)}


@pytest.mark.parametrize("line", ["0", "-3", "2.5", "many", "5 x"])
def test_what_is_not_a_length_is_named(line: str) -> None:
    with pytest.raises(UserError, match=r"--lengths=f line 2: .* is not a length") as raised:
        text_lengths("f", f"7\n{line}\n", 100)
    assert raised.value.remedy


@pytest.mark.parametrize("text", ["lognormal:", "lognormal:3", "lognormal:a,b", "lognormal:nan,1", "lognormal:5,-1"])
def test_a_distribution_that_is_not_possible_is_rejected(text: str) -> None:
    with pytest.raises(UserError, match="must be lognormal:MU,SIGMA"):
        lognormal_lengths(text, 100)


def test_an_empty_file_is_rejected() -> None:
    with pytest.raises(UserError, match="--lengths=f has no lengths"):
        text_lengths("f", "\n", 100)
