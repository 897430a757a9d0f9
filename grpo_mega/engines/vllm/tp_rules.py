"""Rules for splitting a model over the ranks of vLLM, checked early because vLLM's own errors come late."""

from __future__ import annotations

from grpo_mega.models.spec import ModelSpec
from grpo_mega.types import UserError

VOCAB_PADDING = 64  # vLLM pads embedding and head to a multiple of this for every tp


def check_tp(spec: ModelSpec, tp: int) -> None:
    """Check that vLLM can split this model over `tp` ranks.

    Raises:
        UserError: `tp` does not divide a size of the model (names it).
    """
    sizes = {
        "num_attention_heads": spec.num_heads,
        "intermediate_size": spec.ffn_size,
        f"the vocabulary padded to {VOCAB_PADDING}": padded_vocab(spec),
    }
    for name, size in sizes.items():
        if size % tp:
            raise UserError(f"engine.tp={tp} does not divide {name}={size}", remedy="use a divisor of it")
    if max(tp, spec.num_kv_heads) % min(tp, spec.num_kv_heads):
        raise UserError(
            f"engine.tp={tp} neither divides num_key_value_heads={spec.num_kv_heads} nor is a multiple of it",
            remedy="use a divisor or a multiple of num_key_value_heads",
        )


def padded_vocab(spec: ModelSpec) -> int:
    """Return the rows of embedding and head, over all ranks, after padding."""
    return -(-spec.vocab_size // VOCAB_PADDING) * VOCAB_PADDING
