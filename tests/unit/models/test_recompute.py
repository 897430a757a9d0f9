"""Modules that selective recomputation chooses."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_mega.config.policy_sections import ParallelConfig
from grpo_mega.models.recompute import recomputed_modules
from tests.helpers.planner_cases import spec_of


@pytest.mark.parametrize(
    ("family", "keys", "fused", "expected"),
    [
        ("llama", {"recompute": "selective"}, False, ("core_attn",)),
        ("llama", {"recompute": "selective"}, True, ()),
        ("qwen3_moe", {"recompute": "selective"}, True, ()),
        ("deepseek_v3", {"recompute": "selective"}, False, ("core_attn",)),
        ("deepseek_v3", {"recompute": "selective"}, True, ("mla_up_proj",)),
        ("llama", {"recompute": "selective", "recompute_modules": ("mlp", "core_attn")}, True, ("mlp", "core_attn")),
        ("llama", {"recompute": "full"}, True, ()),
        ("llama", {"recompute": "none"}, False, ()),
    ],
)
def test_fused_attention_is_not_recomputed_unless_it_is_named(
    family: str, keys: dict[str, Any], fused: bool, expected: tuple[str, ...]
) -> None:
    assert recomputed_modules(spec_of(family), ParallelConfig(**keys), fused_attention=fused) == expected
