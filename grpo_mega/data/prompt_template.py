"""Conversion of the prompt of a row into the text and the tokens that the engine gets.

`chat` applies a chat template and opens the assistant's turn, or continues the last message if the assistant wrote it.
`plain` uses the text unchanged. The tokens made here are the tokens that are trained on: no later step tokenizes text
again.
Asserted by tests/unit/data/test_prompt_template.py.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateSyntaxError

from grpo_mega.config.data_sections import DataConfig
from grpo_mega.data.prompt_rows import PromptSource
from grpo_mega.data.special_tokens import SpecialTokens
from grpo_mega.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt after the template. `spelled` are special tokens that the row contains and that were encoded as text."""

    text: str
    token_ids: tuple[int, ...]
    spelled: tuple[str, ...] = ()


class PromptTemplate:
    """The template of `data.template` with the tokenizer of a model.

    Args:
        config: the section `data`.
        tokenizer: the model's tokenizer.

    Raises:
        UserError: `data.chat_template` cannot be read, the template has a syntax error, the tokenizer has no chat
            template, or the template does not use a key of `data.chat_template_kwargs`.
    """

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config, self._tokenizer = config, tokenizer
        self.source = None if config.template == "plain" else _template_source(config, tokenizer)
        """Text of the chat template; None with `data.template=plain`."""
        if self.source is not None:
            _check_template(self.source, config, tokenizer)

    def render(self, prompt: PromptSource) -> RenderedPrompt:
        """Apply the template to a prompt: a string (one user message) or a list of `{role, content}` messages.

        Raises:
            UserError: a special token in the row cannot be encoded as text.
            Exception: any exception of the template or of the tokenizers library.
        """
        messages = self.messages(prompt)
        spelled = [] if self._config.allow_special_tokens else self._special.spelled_in(_without_roles(messages))
        if self.source is None:
            text = "\n\n".join(message["content"] for message in messages)
            return RenderedPrompt(text, self._encode_plain(text), tuple(spelled))
        text = self._apply(messages)
        if not spelled:
            # The template has already written BOS and other special tokens.
            token_ids = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)
            return RenderedPrompt(text, tuple(token_ids))
        marked = self._apply([self._special.mark(message) | {"role": message["role"]} for message in messages])
        return RenderedPrompt(text, tuple(self._special.encode_marked(marked, text, spelled)), tuple(spelled))

    def messages(self, prompt: PromptSource) -> list[dict[str, Any]]:
        """Return the prompt as messages, with `data.system_prompt` before a prompt that has no system message."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        if self._config.system_prompt is not None and all(message["role"] != "system" for message in messages):
            messages.insert(0, {"role": "system", "content": self._config.system_prompt})
        return messages

    def _apply(self, messages: list[dict[str, Any]]) -> str:
        """Return the text of the chat template; it ends where the answer of the policy begins."""
        continues = messages[-1]["role"] == "assistant"
        return str(
            self._tokenizer.apply_chat_template(
                messages,
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=not continues,
                continue_final_message=continues,
                **self._config.chat_template_kwargs,
            )
        )

    def _encode_plain(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a plain text with what the tokenizer puts before a text (BOS), but not after it (EOS).

        A text that begins with these tokens already gets no second ones.
        """
        split = not self._config.allow_special_tokens
        if split:
            token_ids = self._special.encode_as_text(text)
        else:
            token_ids = list(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False))
        whole = list(self._tokenizer.encode(text, split_special_tokens=split))
        ends = range(len(whole) - len(token_ids) + 1)
        begin = next((at for at in ends if whole[at : at + len(token_ids)] == token_ids), None) if token_ids else 0
        if begin is None:
            raise UserError(
                "data.template=plain needs a tokenizer that adds special tokens only before or after a text",
                remedy="use data.template=chat",
            )
        before = whole[:begin]
        return tuple(token_ids if token_ids[:begin] == before else before + token_ids)

    @cached_property
    def _special(self) -> SpecialTokens:
        return SpecialTokens(self._tokenizer)


def _template_source(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of `data.chat_template`, else the chat template of the tokenizer."""
    if config.chat_template is not None:
        try:
            return Path(config.chat_template).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise UserError(
                f"data.chat_template={config.chat_template} cannot be read ({reason})",
                remedy="name a readable file with a Jinja template",
            ) from error
    if tokenizer.chat_template is None:
        raise UserError(
            "data.template=chat needs a chat template, which the model's tokenizer does not have",
            remedy="use data.template=plain, or set data.chat_template to a file with a Jinja template",
        )
    return str(tokenizer.get_chat_template(tools=config.chat_template_kwargs.get("tools")))


def _check_template(source: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if the template has a syntax error, or does not use a key of `data.chat_template_kwargs`."""
    where = f"data.chat_template={config.chat_template}" if config.chat_template else "the tokenizer's chat template"
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=source, tokenize=False)
    except Exception as error:  # a template can raise anything, and may reject this example but not the run's prompts
        if isinstance(error, TemplateSyntaxError):
            raise UserError(
                f"{where}, line {error.lineno}: {error.message}", remedy="correct the Jinja template"
            ) from error
    words = set(re.findall(r"\w+", source))
    for key in config.chat_template_kwargs:
        if key not in words:
            near = difflib.get_close_matches(key, words, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(
                f"data.chat_template_kwargs.{key} has no effect: {where} does not use {key}{hint}",
                remedy=f"remove {key}",
            )


def _without_roles(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in message.items() if key != "role"} for message in messages]
