"""The model's tokenizer, and what rollouts need of it: replies of environments, and the texts of tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from grpo_mega.data.answer_ends import cut_at_stop, eos_ids
from grpo_mega.data.answer_text import answer_text, dropped_ids
from grpo_mega.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Each of these files can hold the vocabulary. Without one, transformers builds an empty tokenizer from config.json.
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face model folder.

    Raises:
        UserError: the folder does not exist, its tokenizer is missing or damaged, the tokenizer has no EOS token, or
            tokens that are not in the model's vocabulary, or a file of the folder has a wrong `eos_token_id`.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"model.path={path} is not a folder",
            remedy="give a Hugging Face model folder, or the name of a model on the hub (ORGANIZATION/NAME)",
        )
    if not any((folder / name).is_file() for name in _VOCABULARY_FILES):
        raise UserError(
            f"model.path={path} contains no tokenizer (none of {', '.join(_VOCABULARY_FILES)})",
            remedy="copy the tokenizer's files into this folder",
        )
    from transformers import AutoTokenizer  # a slow import, so it follows the checks of the folder

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise plain Exceptions
        reason = str(error).split("\n", 1)[0]
        raise UserError(
            f"model.path={path}: its tokenizer cannot be read ({reason})", remedy="copy the tokenizer's files again"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.path={path}: the tokenizer has no EOS token, which ends every completion",
            remedy="set eos_token in tokenizer_config.json",
        )
    _check_vocabulary(tokenizer, folder)
    eos_ids(folder, tokenizer.eos_token_id)  # the engine reads them later; an error must come before the start
    return tokenizer


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raise UserError if the folder's tokenizer has a token that the model has no embedding for.

    Tokens that are in no file of the folder do not count: transformers' class for a model type adds its default special
    tokens to any tokenizer (Qwen2Tokenizer adds `<|endoftext|>`), and text that names one is encoded as text.
    """
    config = folder / "config.json"
    vocab_size = json.loads(config.read_text(encoding="utf-8")).get("vocab_size") if config.is_file() else None
    if not isinstance(vocab_size, int):  # grpo_mega/models/config_readers.py reports it
        return
    own = _tokens_of_files(folder)
    outside = sorted(
        (token_id, token)
        for token, token_id in tokenizer.get_vocab().items()
        if token_id >= vocab_size and (own is None or token in own)
    )
    if outside:
        named = ", ".join(f"{token!r} ({token_id})" for token_id, token in outside[:5])
        raise UserError(
            f"model.path={folder}: {len(outside)} tokens of the tokenizer are not in the model's vocabulary, which has "
            f"vocab_size={vocab_size}: {named}{', ...' if len(outside) > 5 else ''}",
            remedy="use the tokenizer of this model, or enlarge the model's embedding (resize_token_embeddings)",
        )


def _tokens_of_files(folder: Path) -> set[str] | None:
    """Return the tokens that the folder's files name; None if its tokenizer is not in tokenizer.json."""
    if not (folder / "tokenizer.json").is_file():
        return None
    tokens = set(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True))
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        added = json.loads(settings.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
        tokens |= {str(entry.get("content")) for entry in added.values()}
    return tokens


@dataclass(frozen=True)
class ResultText:
    """Conversion of an environment's result into tokens.

    `before`, the result and `after` are tokenized separately and concatenated. `before` and `after` may contain special
    tokens; a result that spells a special token stays text.
    """

    tokenizer: PreTrainedTokenizerBase
    before: str
    after: str

    def encode(self, result: str) -> tuple[int, ...]:
        """Return the tokens that follow the answer of the policy.

        Raises:
            ValueError: the tokenizer cannot encode the result.
        """
        found: list[int] = []
        try:
            for text, is_text in ((self.before, False), (result, True), (self.after, False)):
                options = {"split_special_tokens": True} if is_text else {}
                found += self.tokenizer.encode(text, add_special_tokens=False, **options) if text else []
        except Exception as error:  # the tokenizers library raises plain Exceptions
            raise ValueError(f"the model's tokenizer cannot encode {result[:80]!r} ({error})") from error
        return tuple(found)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, as of an answer."""
        return answer_text(self.tokenizer, token_ids)

    def cut_at_stop(self, token_ids: Sequence[int], stop: Sequence[str]) -> tuple[str, str] | None:
        """Return the text up to and including the stop text that the last token completes, and that stop text."""
        return cut_at_stop(self.tokenizer, token_ids, stop)


def text_with_special_tokens(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Return the text of tokens, special tokens such as `<|im_end|>` included."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=False))


def token_ends(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[int]:
    """Return, per token, the number of characters of the text up to the end of that token.

    A character of several tokens is counted with its last token. Special tokens add no characters, except the tags
    around a thought (`answer_text`).
    """
    from tokenizers.decoders import DecodeStream

    dropped = dropped_ids(tokenizer, token_ids)
    stream, length, ends = DecodeStream(skip_special_tokens=dropped is None), 0, []
    for token_id in token_ids:
        if dropped is None or token_id not in dropped:
            length += len(stream.step(tokenizer.backend_tokenizer, token_id) or "")
        ends.append(length)
    return ends
