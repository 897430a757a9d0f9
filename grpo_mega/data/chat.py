"""Conversion of a prompt into the tokens that the engine gets: the model's tokenizer and the prompt template.

`chat` applies the tokenizer's own chat template and opens the assistant's turn; `plain` uses the text unchanged. The
tokens made here are the tokens that are trained on: no later step tokenizes text again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from grpo_mega.data.answer_ends import cut_at_stop
from grpo_mega.data.prompt_rows import PromptSource
from grpo_mega.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["chat", "plain"]

# Each of these files can hold the vocabulary. Without one, transformers builds an empty tokenizer from config.json.
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face model folder.

    Raises:
        UserError: the folder does not exist, its tokenizer is missing or damaged, or the tokenizer has no EOS token.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"model.path={path} is not a folder", remedy="give a Hugging Face model folder")
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
    return tokenizer


def render_prompt(
    prompt: PromptSource,
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    system_prompt: str | None,
) -> tuple[str, tuple[int, ...]]:
    """Apply the template to a prompt; return its text and its tokens.

    Args:
        prompt: a string (one user message) or a list of `{role, content}` messages.
        tokenizer: the model's tokenizer.
        template: `chat` applies the tokenizer's chat template and opens the assistant's turn; `plain` joins the
            contents of the messages with blank lines, so that a string is unchanged.
        system_prompt: added before a prompt that has no system message.

    Raises:
        UserError: the template is `chat` and the tokenizer has no chat template.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    if system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    if template == "plain":
        text = "\n\n".join(message["content"] for message in messages)
        return text, tuple(tokenizer.encode(text))
    if tokenizer.chat_template is None:
        raise UserError(
            "data.template=chat needs a chat template, which the model's tokenizer does not have",
            remedy="use data.template=plain",
        )
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    # The template has already written BOS and other special tokens.
    return text, tuple(tokenizer.encode(text, add_special_tokens=False))


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
        """Return the text of tokens, without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def cut_at_stop(self, token_ids: Sequence[int], stop: Sequence[str]) -> tuple[str, str] | None:
        """Return the text up to and including the stop text that the last token completes, and that stop text."""
        return cut_at_stop(self.tokenizer, token_ids, stop)


def token_ends(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[int]:
    """Return, per token, the number of characters of the text up to the end of that token.

    A character of several tokens is counted with its last token. Special tokens add no characters.
    """
    from tokenizers.decoders import DecodeStream

    stream, length, ends = DecodeStream(skip_special_tokens=True), 0, []
    for token_id in token_ids:
        length += len(stream.step(tokenizer.backend_tokenizer, token_id) or "")
        ends.append(length)
    return ends
