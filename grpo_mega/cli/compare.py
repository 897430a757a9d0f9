"""Dispatch `grpo-mega compare checkpoints | logits | layouts | mapping` to one module per comparison."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_mega.cli.main import Command, dispatch

COMPARISONS = {
    "checkpoints": Command("compare_checkpoints", "two checkpoints of any format and layout, tensor by tensor"),
    "logits": Command("compare_logits", "logits of Megatron in a layout with logits of transformers"),
    "layouts": Command("compare_layouts", "loss and gradient of one batch in several layouts"),
    "mapping": Command("check_mapping", "check that a layout holds each checkpoint element once; reads only headers"),
}


def main(argv: Sequence[str]) -> int:
    """Run the subcommand and return its exit code."""
    return dispatch(argv, COMPARISONS, "grpo-mega compare")
