"""The text of an answer: its tokens without special tokens, except the tags around a thought.

Some tokenizers mark `<think>` and `</think>` as special. Without these tags a reward could not separate the thought
from the answer, and a prompt that ends with `<think>` would never be closed.
Asserted by tests/unit/data/test_answer_text.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The names are THOUGHT_TAGS of grpo_mega/rewards/thought.py.
_THOUGHT_TAG = re.compile(r"</?\s*(?:think|thinking|thought|reasoning)\s*>", re.IGNORECASE)


def answer_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Return the text of tokens without special tokens, except the tags around a thought.

    Args:
        tokenizer: the model's tokenizer.
        token_ids: of an answer.
    """
    dropped = dropped_ids(tokenizer, token_ids)
    if dropped is None:
        return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))
    return str(tokenizer.decode([i for i in token_ids if i not in dropped], skip_special_tokens=False))


def dropped_ids(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> frozenset[int] | None:
    """Return the special tokens that add no text; None: all, because no tag of a thought is among `token_ids`."""
    special, tags = _special_ids(tokenizer)
    return special - tags if not tags.isdisjoint(token_ids) else None


@functools.lru_cache(maxsize=8)
def _special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[frozenset[int], frozenset[int]]:
    """Return all special tokens, and those that are tags of a thought."""
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(special), frozenset(i for i, text in special.items() if _THOUGHT_TAG.fullmatch(text))
