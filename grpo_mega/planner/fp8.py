"""Effect of FP8 on the bytes of weights and activations, from reading Transformer Engine 2.x for Hopper.

An FP8 matrix product reads each operand in one order only, so a weight is stored in both orders: two bytes per element,
as many as bf16. Without `precision.fp8.params` they stand beside the bf16 weight and are made anew once per update
(module/base.py, `_fp8_workspaces`). With it, one of the two is the weight. Inputs of products are kept for the backward
pass in one byte per element. Scales are left out: 1/64 to 1/32 of a byte per element with blocks.

Not verified: no run with FP8 was measured. Asserted, against numbers worked by hand, by tests/unit/planner/test_fp8.py.
"""

from __future__ import annotations

from grpo_mega.config.schema import Config

INPUT_BYTES = 1
"""Bytes of an element that an FP8 product keeps for its backward pass."""


def is_fp8_layer(config: Config, layer: int, num_layers: int) -> bool:
    """Return True if the layer multiplies in FP8. `layer` counts from 0 through the whole model."""
    fp8 = config.precision.fp8
    return fp8 is not None and fp8.first_layers_bf16 <= layer < num_layers - fp8.last_layers_bf16


def saved_weight_bytes(config: Config, elements: int) -> int:
    """Return the bytes by which FP8 weights are smaller than bf16 weights."""
    fp8 = config.precision.fp8
    return elements if fp8 is not None and fp8.params else 0


def copied_weight_bytes(config: Config, elements: int) -> int:
    """Return the bytes of the FP8 copies beside the weights, while the policy computes."""
    fp8 = config.precision.fp8
    if fp8 is None:
        return 0
    return elements if fp8.params else 2 * elements
