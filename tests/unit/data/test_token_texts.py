"""Texts of single tokens."""

from __future__ import annotations

from grpo_mega.data.token_texts import TokenTextCache
from grpo_mega.data.tokenizers import byte_tokenizer, char_tokenizer


def test_each_token_has_its_text_and_special_tokens_have_theirs() -> None:
    tokenizer = char_tokenizer("0123456789+=")
    ids = tokenizer.encode("1+2=3", add_special_tokens=False)
    texts = TokenTextCache(tokenizer)
    assert texts([*ids, 1]) == ["1", "+", "2", "=", "3", "<eos>"]
    assert texts([1, ids[0]]) == ["<eos>", "1"]
    assert texts([]) == []


def test_a_part_of_a_character_is_the_replacement_character() -> None:
    tokenizer = byte_tokenizer()
    assert TokenTextCache(tokenizer)(tokenizer.encode("\u00e9", add_special_tokens=False)) == ["\ufffd", "\ufffd"]
