"""Sampling options that evaluation has and training has not, and the reason.

The ratio of an update compares the policy's probability of a token with the probability that it was sampled with. The
policy computes softmax(logits / temperature) over the whole vocabulary. An engine that samples from fewer tokens, or
from changed logits, has other probabilities: each ratio would be wrong by an unknown factor. The tokens that were kept
cannot be computed again from the policy's logits, because rounding differs at the border, and engines do not return
them. Asserted by tests/unit/config/test_sampling_options.py.
"""

from __future__ import annotations

EVALUATION_ONLY = (
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "bad_words",
)
"""Keys of `evaluation` that `sampling` does not have."""


def not_in_training(name: str) -> str:
    """Return the message for `sampling.<name>`."""
    return (
        f"sampling.{name}: not supported in training: the engine would sample with other probabilities than the "
        f"policy's softmax over all tokens, and every importance ratio would be wrong; remove it (sampling.temperature "
        f"is supported), or set evaluation.{name} for evaluations only"
    )


def token_ids(value: object) -> object:
    """Return a mapping with token ids as keys; JSON and a stored config have them as text."""
    if not isinstance(value, dict):
        return value
    return {int(key) if isinstance(key, str) and key.isdecimal() else key: bias for key, bias in value.items()}
