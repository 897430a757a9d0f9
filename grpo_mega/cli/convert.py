"""Dispatch `grpo-mega convert to-megatron | to-hf` to one module per direction."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_mega.cli.main import Command, dispatch

DIRECTIONS = {
    "to-megatron": Command("hf_to_megatron", "a Hugging Face folder to a Megatron torch_dist checkpoint"),
    "to-hf": Command("megatron_to_hf", "a checkpoint of Megatron or of a run to a Hugging Face folder"),
}


def main(argv: Sequence[str]) -> int:
    """Run the subcommand and return its exit code."""
    return dispatch(argv, DIRECTIONS, "grpo-mega convert")
