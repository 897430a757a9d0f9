"""Functions of Megatron-Core that are replaced where Transformer Engine does not compute."""

from __future__ import annotations

import importlib.util
import random
from types import SimpleNamespace

import pytest
import torch

from grpo_mega.policy.megatron_patches import local_modules
from grpo_mega.policy.megatron_patches.local_modules import rotary_packed
from tests.helpers.attention_oracle import bounds_of


def random_lengths(seed: int) -> list[int]:
    """Return ragged lengths, with sequences of one token, and a padding segment at the end."""
    rng = random.Random(seed)
    return [1, *(rng.choice([1, 2, 3, 7, 8, 9, 30, 64]) for _ in range(rng.randrange(1, 12))), rng.randrange(1, 40)]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("cp", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_rotary_in_one_gather_is_megatron_s_function_per_sequence(interleaved: bool, cp: int, seed: int) -> None:
    # a copy of its own: that of this process may have our function in it
    found = importlib.util.find_spec("megatron.core.models.common.embeddings.rope_utils")
    assert found is not None
    assert found.loader is not None
    rope_utils = importlib.util.module_from_spec(found)
    found.loader.exec_module(rope_utils)
    bounds = bounds_of([n if cp == 1 else 2 * cp * n for n in random_lengths(seed)])
    total = int(bounds[-1])
    generator = torch.Generator().manual_seed(seed)
    # not as long as the row, which Megatron would read as positions over the whole row
    freqs = torch.randn(total + 1, 1, 1, 8, generator=generator)
    for rank in range(cp):
        group = SimpleNamespace(size=lambda: cp, rank=lambda rank=rank: rank)
        share = torch.randn(total // cp, 3, 10, generator=generator)  # 8 of 10 elements are rotated
        expected = rope_utils._apply_rotary_pos_emb_thd(
            share, bounds, freqs, rotary_interleaved=interleaved, mscale=1.5, cp_group=group
        )
        rotated = rotary_packed(share, bounds, freqs, rotary_interleaved=interleaved, mscale=1.5, cp_group=group)
        assert torch.equal(rotated, expected)


def test_recomputed_modules_find_that_fp8_is_off() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    local_modules.install()
    assert not megatron_random.HAVE_TE
    assert not megatron_random.FP8GlobalStateManager.is_fp8_enabled()
    with megatron_random.activation_recompute_forward(activation_recompute=True, recompute_phase=False):
        assert torch.is_grad_enabled()
