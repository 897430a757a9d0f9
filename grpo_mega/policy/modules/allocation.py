"""Device on which Megatron's modules allocate their parameters."""

from __future__ import annotations

from typing import Any

import torch


def allocation_device(config: Any) -> torch.device | None:
    """Return the device of a new parameter; None is torch's default device.

    Megatron's own modules do the same (tensor_parallel/layers.py:278, extensions/transformer_engine.py:407).

    Args:
        config: Megatron's TransformerConfig, or anything with its fields.
    """
    if config.use_cpu_initialization:
        return None
    if config.init_model_with_meta_device:
        return torch.device("meta")
    return torch.device("cuda", torch.cuda.current_device())
