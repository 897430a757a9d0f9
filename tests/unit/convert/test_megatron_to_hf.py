"""Facts about a converted checkpoint that its config.json states."""

from __future__ import annotations

import torch

from grpo_mega.convert.megatron_to_hf import main_dtype


def test_the_dtype_of_a_checkpoint_is_that_of_most_elements_that_are_not_quantized() -> None:
    shapes = {"bias": (4,), "embed": (8, 4), "linear": (64, 64)}
    dtypes = {"bias": torch.float32, "embed": torch.bfloat16, "linear": torch.float8_e4m3fn}
    assert main_dtype(shapes, dtypes) == torch.bfloat16
    assert main_dtype(shapes, dtypes | {"linear": torch.float32}) == torch.float32
