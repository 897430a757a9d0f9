"""The two tokenizers of the tiny models: one token per character of an alphabet, and one token per byte.

Both are `transformers` fast tokenizers (saved as `tokenizer.json`), with `<pad>` = 0 and `<eos>` = 1. Text that spells
a special token never becomes that token. Nothing is normalized, added or dropped.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import Fuse
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Split
from transformers import PreTrainedTokenizerFast

PAD_TOKEN = "<pad>"
EOS_TOKEN = "<eos>"
_SPECIAL = (PAD_TOKEN, EOS_TOKEN)


def char_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character, with ids from 2 in the order of `alphabet`.

    There is no unknown token: encoding a character outside of the alphabet raises an error.

    Raises:
        ValueError: a character occurs twice.
    """
    if len(set(alphabet)) != len(alphabet):
        raise ValueError(f"alphabet={alphabet!r} repeats a character; list each once")
    core = Tokenizer(WordLevel(_vocabulary(list(alphabet)), unk_token="<unknown>"))
    core.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = Fuse()
    return _finish(core)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per UTF-8 byte: byte b has id b + 2, and `decode(encode(text)) == text`."""
    core = Tokenizer(BPE(vocab=_vocabulary(_byte_symbols()), merges=[]))
    core.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = ByteLevelDecoder()
    return _finish(core)


def _vocabulary(symbols: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate([*_SPECIAL, *symbols])}


def _byte_symbols() -> list[str]:
    """Return the character by which byte-level BPE represents each byte, in the order of the bytes.

    A printable Latin-1 byte represents itself; the k-th other byte is represented by chr(256 + k).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    symbols = [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]
    assert set(symbols) == set(ByteLevel.alphabet())
    return symbols


def _finish(core: Tokenizer) -> PreTrainedTokenizerFast:
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in _SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )
