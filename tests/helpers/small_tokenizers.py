"""Small byte-level BPE tokenizers with special tokens, made without a download."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<|begin|>", "<|end|>", "<|start|>", "<|stop|>")
"""Special tokens, with ids 0 to 4. `<|end|>` is EOS, `<|begin|>` BOS."""


def bpe_tokenizer(
    words: Sequence[str] = (),
    *,
    special: Sequence[str] = (),
    add_bos: bool = False,
    add_eos: bool = False,
    **settings: object,
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer: the special tokens, 256 bytes, and merges that give each of `words` one token.

    `special` are further special tokens, after the bytes and the words. `add_bos` and `add_eos` make it add these
    tokens to every text, as Llama's tokenizers do.
    """
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *symbols])}
    merges: list[tuple[str, str]] = []
    for word in words:
        ((spelled, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(word)
        for end in range(2, len(spelled) + 1):
            if spelled[:end] not in vocab:
                vocab[spelled[:end]] = len(vocab)
                merges.append((spelled[: end - 1], spelled[end - 1]))
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*SPECIAL, *special)])
    if add_bos or add_eos:
        begin, end = ("<|begin|> " if add_bos else ""), (" <|end|>" if add_eos else "")
        core.post_processor = processors.TemplateProcessing(
            single=f"{begin}$A{end}", pair=f"{begin}$A $B{end}", special_tokens=[("<|begin|>", 1), ("<|end|>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<|begin|>", eos_token="<|end|>", **settings
    )
