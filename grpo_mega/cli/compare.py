"""`grpo-mega compare checkpoints | logits | layouts | mapping`: one subcommand per comparison."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_mega.cli.main import Command, dispatch

COMPARISONS = {
    "checkpoints": Command("compare_checkpoints", "two checkpoints of any format and layout, tensor by tensor"),
    "logits": Command("compare_logits", "Megatron's logits in a layout against those of transformers"),
    "layouts": Command("compare_layouts", "loss and gradient of one recorded batch in several layouts"),
    "mapping": Command("check_mapping", "every byte of a checkpoint is used once by a layout, from headers alone"),
}


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    return dispatch(argv, COMPARISONS, "grpo-mega compare")
