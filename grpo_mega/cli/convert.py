"""`grpo-mega convert to-megatron | to-hf`: the two directions of a conversion."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_mega.cli.main import Command, dispatch

DIRECTIONS = {
    "to-megatron": Command("hf_to_megatron", "a Hugging Face folder to a Megatron torch_dist checkpoint"),
    "to-hf": Command("megatron_to_hf", "a Megatron checkpoint, or a run's, to a Hugging Face folder"),
}


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    return dispatch(argv, DIRECTIONS, "grpo-mega convert")
