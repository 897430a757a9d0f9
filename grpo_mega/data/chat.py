"""From a question to the tokens that the engine gets: the tokenizer of a model folder, and the prompt template.

`chat` writes the messages with the tokenizer's own template and opens the answer's turn; `plain` is the text itself.
What is tokenised here is what is trained on: nothing downstream tokenises text again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from grpo_mega.data.rows import PromptSource
from grpo_mega.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["chat", "plain"]

# Any one of these holds a vocabulary; without one, transformers builds an empty tokenizer from config.json alone.
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face model folder.

    Raises:
        UserError: the folder does not exist, holds no tokenizer or a damaged one, or its tokenizer has no EOS token.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"model.path={path} is not a folder", remedy="give a Hugging Face model folder")
    if not any((folder / name).is_file() for name in _VOCABULARY_FILES):
        raise UserError(
            f"model.path={path} holds no tokenizer (none of {', '.join(_VOCABULARY_FILES)})",
            remedy="copy the tokenizer's files beside config.json",
        )
    from transformers import AutoTokenizer  # takes seconds: after the checks of the folder

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise bare Exceptions of their own
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
    """The prompt's text after the template, and its tokens.

    Args:
        prompt: a string (one user message) or a list of `{role, content}` messages.
        tokenizer: of the model.
        template: `chat` applies the tokenizer's chat template with the opening of the answer; `plain` joins the
            contents with blank lines, so that a string stays as it is.
        system_prompt: put before a prompt that has no system message of its own.

    Raises:
        UserError: `chat` with a tokenizer that has no chat template.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    if system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    if template == "plain":
        text = "\n\n".join(message["content"] for message in messages)
        return text, tuple(tokenizer.encode(text))
    if tokenizer.chat_template is None:
        raise UserError(
            "data.template=chat needs a tokenizer with a chat template, and this model's has none",
            remedy="use data.template=plain",
        )
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    # The template has already written BOS and the like.
    return text, tuple(tokenizer.encode(text, add_special_tokens=False))


@dataclass(frozen=True)
class ResultText:
    """Turns an environment's result into tokens: `before`, the result and `after`, each tokenised alone, one behind the
    other. Special tokens may be spelled in `before` and `after`; a result that spells one stays text."""

    tokenizer: PreTrainedTokenizerBase
    before: str
    after: str

    def encode(self, result: str) -> tuple[int, ...]:
        """The tokens that follow the answer.

        Raises:
            ValueError: the tokenizer cannot write it.
        """
        found: list[int] = []
        try:
            for text, is_text in ((self.before, False), (result, True), (self.after, False)):
                options = {"split_special_tokens": True} if is_text else {}
                found += self.tokenizer.encode(text, add_special_tokens=False, **options) if text else []
        except Exception as error:  # the tokenizers library raises bare Exceptions of its own
            raise ValueError(f"the model's tokenizer cannot encode {result[:80]!r} ({error})") from error
        return tuple(found)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))


def token_ends(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[int]:
    """Per token, the number of characters of the text up to and with it. A character of several tokens counts with the
    last of them; special tokens spell nothing."""
    from tokenizers.decoders import DecodeStream

    stream, length, ends = DecodeStream(skip_special_tokens=True), 0, []
    for token_id in token_ids:
        length += len(stream.step(tokenizer.backend_tokenizer, token_id) or "")
        ends.append(length)
    return ends
