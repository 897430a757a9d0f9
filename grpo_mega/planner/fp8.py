"""What FP8 changes: bytes of weights and of what autograd keeps, from reading Transformer Engine (2.x, Hopper).

A product of FP8 matrices takes its operands in one order only, so a weight is held in both: two bytes for each element
where bf16 has two. Without `precision.fp8.params` they stand beside the bf16 weight, made anew once an update
(module/base.py, `_fp8_workspaces`); with it one of the two is the weight. Inputs of products are kept for the backward
pass in one byte. Scales, a 64th of a byte to a 32nd for blocks, are left out. Unproven: nothing of it has run.
Asserted, by hand, by tests/unit/planner/test_fp8.py.
"""

from __future__ import annotations

from grpo_mega.config.schema import Config

INPUT_BYTES = 1
"""Of an element that a product keeps for its backward pass."""


def is_fp8_layer(config: Config, layer: int, num_layers: int) -> bool:
    """Does this layer multiply in FP8? `layer` counts from 0 through the model."""
    fp8 = config.precision.fp8
    return fp8 is not None and fp8.first_layers_bf16 <= layer < num_layers - fp8.last_layers_bf16


def saved_weight_bytes(config: Config, elements: int) -> int:
    """By which weights in FP8 are smaller than in bf16."""
    fp8 = config.precision.fp8
    return elements if fp8 is not None and fp8.params else 0


def copied_weight_bytes(config: Config, elements: int) -> int:
    """Of the copies beside the weights, while the policy computes."""
    fp8 = config.precision.fp8
    if fp8 is None:
        return 0
    return elements if fp8.params else 2 * elements
