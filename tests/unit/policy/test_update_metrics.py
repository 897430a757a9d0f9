"""The entropy below which a tenth of the tokens lies, from bins that ranks can add."""

from __future__ import annotations

import pytest
import torch

from grpo_mega.policy.update_metrics import quantile_of_bins, weight_bins


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_a_quantile_of_many_values_is_found_to_8_percent(seed: int, fraction: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = 10 ** (6 * torch.rand(5000, generator=generator) - 5)
    found = quantile_of_bins(weight_bins(values, torch.ones(5000)), fraction)
    assert found == pytest.approx(float(values.quantile(fraction)), rel=0.08)


def test_tokens_count_by_their_weight_and_bins_of_ranks_add_up() -> None:
    values, weights = torch.tensor([0.01, 1.0]), torch.tensor([1.0, 3.0])
    bins = weight_bins(values[:1], weights[:1]) + weight_bins(values[1:], weights[1:])
    assert float(bins.sum()) == 4.0
    torch.testing.assert_close(bins, weight_bins(values, weights))
    assert quantile_of_bins(bins, 0.2) == pytest.approx(0.01, rel=0.16)
    assert quantile_of_bins(bins, 0.3) == pytest.approx(1.0, rel=0.16)


def test_a_small_change_of_a_value_at_the_edge_of_a_bin_changes_little() -> None:
    edge = 1e-6 * 10 ** (64 / 16)
    values = [torch.tensor([edge * (1 + sign * 1e-7), 0.5, 1.0], dtype=torch.float64) for sign in (-1, 1)]
    low, high = (quantile_of_bins(weight_bins(v, torch.ones(3)), 0.1) for v in values)
    assert low == pytest.approx(high, rel=1e-5)


def test_zero_and_huge_entropies_and_no_tokens_have_a_value() -> None:
    assert quantile_of_bins(weight_bins(torch.zeros(4), torch.ones(4)), 0.1) == 0.0
    assert quantile_of_bins(weight_bins(torch.full((4,), 1e9), torch.ones(4)), 0.5) > 10
    assert quantile_of_bins(weight_bins(torch.ones(4), torch.zeros(4)), 0.1) == 0.0
