"""grpo_mega.models.flops by hand, and by counting pairs of tokens.

tests/parallel/test_flops.py has the real modules.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from grpo_mega.models.config_readers import spec_from_config
from grpo_mega.models.flops import attention_flops, forward_flops, weights_per_token
from tests.helpers.family_configs import raw_family_config


def test_weights_of_a_dense_model_by_hand() -> None:
    spec = spec_from_config(raw_family_config("llama"), "test")  # 2 layers, hidden 64, 4 heads of 16, 2 of keys
    found = weights_per_token(spec)
    assert found.attention == 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64)
    assert found.dense == 2 * 3 * 64 * 96
    assert found.head == 21 * 64
    assert (found.experts, found.router) == (0, 0)


def test_weights_of_experts_and_of_latent_attention_by_hand() -> None:
    spec = spec_from_config(raw_family_config("deepseek_v3"), "test")
    found = weights_per_token(spec)
    queries = 64 * 20 + 20 * 4 * (16 + 8)
    keys_and_values = 64 * (24 + 8) + 24 * 4 * (16 + 12)
    assert found.attention == 2 * (queries + keys_and_values + 4 * 12 * 64)
    assert found.dense == 3 * 64 * 96  # the first layer
    assert found.experts == 3 * 64 * (3 * 32 + 2 * 32)  # three chosen and two shared ones
    assert found.router == 64 * 8


@pytest.mark.parametrize("window", [0, 1, 4, 9, 50])
def test_attention_counts_the_pairs_that_a_query_sees(window: int) -> None:
    spec = replace(
        spec_from_config(raw_family_config("qwen3"), "test"),
        sliding_window=window, windowed=(True, False) if window else (),
    )  # fmt: skip
    lengths = [1, 4, 9, 30]
    full = sum(i + 1 for n in lengths for i in range(n))
    windowed = sum(min(i + 1, window) for n in lengths for i in range(n)) if window else full
    assert attention_flops(spec, lengths) == (full + windowed) * 2 * spec.num_heads * 2 * spec.head_dim


def test_packing_changes_nothing_and_a_longer_sequence_costs_more_per_token() -> None:
    spec = spec_from_config(raw_family_config("qwen3"), "test")
    assert forward_flops(spec, [7, 9]) == forward_flops(spec, [7]) + forward_flops(spec, [9])
    assert forward_flops(spec, [16]) > forward_flops(spec, [8, 8])
