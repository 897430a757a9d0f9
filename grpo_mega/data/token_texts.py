"""Texts of single tokens, for displays. Asserted by tests/unit/data/test_token_texts.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenTextCache:
    """Decodes tokens one by one, and each token only once.

    A token that is a part of a character has the text that the tokenizer gives for it alone, U+FFFD.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def __call__(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text of each token, special tokens included."""
        if new := [token for token in set(token_ids) if token not in self._texts]:
            texts = self._tokenizer.batch_decode([[token] for token in new], clean_up_tokenization_spaces=False)
            self._texts |= dict(zip(new, texts, strict=True))
        return [self._texts[token] for token in token_ids]
