"""Conversion of an example into tokens, and the mask of the tokens that are trained: those of its answers.

With a chat template there are two ways to find the answers in the rendered text, and both are exact:

- a template with `{% generation %}` marks them itself, and the mask is that of transformers'
  `return_assistant_tokens_mask`;
- of any other template, an answer is what the conversation up to it has more than the prompt before it, which ends
  where the assistant's turn opens. Each of the two texts must be the beginning of the next, and of the whole
  conversation; otherwise the row is an error. So the model is trained on texts that it continues when it is sampled.

`plain` appends the completion and EOS to the prompt. The prompt's tokens are those that the engine would get.
Asserted by tests/unit/data/test_example_template.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers.utils.chat_template_utils import render_jinja_template

from grpo_mega.config.data_sections import DataConfig
from grpo_mega.data.example_rows import ASSISTANT, ExampleRow
from grpo_mega.data.prompt_template import PromptTemplate
from grpo_mega.data.special_tokens import SpecialTokens
from grpo_mega.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""Characters begin to end - 1 of a text."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # transformers looks for the same
_REMEDY = (
    "put {% generation %} and {% endgeneration %} around the answers in a copy of the template, and set "
    "data.chat_template to it"
)


@dataclass(frozen=True)
class RenderedExample:
    """Tokens of an example; `is_answer` is True for those of its answers. `spelled`: as in `RenderedPrompt`."""

    token_ids: tuple[int, ...]
    is_answer: tuple[bool, ...]
    spelled: tuple[str, ...] = ()


class ExampleTemplate:
    """The template of `data.template` for whole examples.

    Args:
        config: the section `data`.
        tokenizer: the model's tokenizer.

    Raises:
        UserError: see `PromptTemplate`; or the tokenizer is no fast tokenizer, which a chat template needs.
    """

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._prompts = PromptTemplate(config, tokenizer)
        self._special = SpecialTokens(tokenizer)
        self.marks_answers = bool(_GENERATION.search(self._prompts.source or ""))
        """True if the chat template itself marks the answers, with `{% generation %}`."""
        if self._prompts.source is not None and not tokenizer.is_fast:
            raise UserError(
                "train.objective=sft with data.template=chat needs a fast tokenizer (tokenizer.json), whose tokens "
                "have positions in the text",
                remedy="add tokenizer.json to the model's folder, or use data.template=plain",
            )

    def render(self, row: ExampleRow) -> RenderedExample:
        """Return the tokens and the mask of an example.

        Raises:
            UserError: the answers cannot be found exactly in the rendered text, or a special token in the row cannot be
                encoded as text.
            Exception: any exception of the template or of the tokenizers library.
        """
        if self._prompts.source is None:
            return self._render_plain(row)
        prompt = self._prompts.messages([*row.prompt, *row.completion])
        first = len(prompt) - len(row.completion)
        contents = [{key: value for key, value in message.items() if key != "role"} for message in prompt]
        spelled = [] if self._config.allow_special_tokens else self._special.spelled_in(contents)
        text, spans = self._find_answers(prompt, first)
        if not spelled:
            encoded = self._tokenizer(
                text, add_special_tokens=False, split_special_tokens=False, return_offsets_mapping=True
            )
            ids, places = list(encoded["input_ids"]), list(encoded["offset_mapping"])
        else:
            marked, spans = self._find_answers(
                [self._special.mark(message) | {"role": message["role"]} for message in prompt], first
            )
            ids, places = self._special.encode_marked_spans(marked, text, spelled)
        return RenderedExample(tuple(ids), _tokens_in(places, spans), tuple(spelled))

    def _render_plain(self, row: ExampleRow) -> RenderedExample:
        if not row.prompt or len(row.completion) != 1:
            raise UserError(
                "data.template=plain needs a prompt and one completion in every row",
                remedy="use data.template=chat for conversations",
            )
        prompt = self._prompts.render(row.prompt)
        text = row.completion[0]["content"]
        spelled: list[str] = []
        if self._config.allow_special_tokens:
            answer = list(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False))
        else:
            spelled = self._special.spelled_in(text)
            answer = self._special.encode_as_text(text)
        answer.append(int(self._tokenizer.eos_token_id))
        is_answer = (False,) * len(prompt.token_ids) + (True,) * len(answer)
        return RenderedExample((*prompt.token_ids, *answer), is_answer, (*prompt.spelled, *spelled))

    def _find_answers(self, messages: Sequence[Mapping[str, Any]], first: int) -> tuple[str, list[Span]]:
        """Return the rendered text, and the places of the answers among the messages from `first` on."""
        if self.marks_answers:
            return self._marked_answers(messages, first)
        return self._answers_by_difference(messages, first)

    def _marked_answers(self, messages: Sequence[Mapping[str, Any]], first: int) -> tuple[str, list[Span]]:
        """Return the text and the spans of a template that marks the answers itself."""
        variables = {**self._tokenizer.special_tokens_map, **self._config.chat_template_kwargs}
        rendered, found = render_jinja_template(
            conversations=[list(messages)],
            chat_template=self._prompts.source,
            return_assistant_tokens_mask=True,
            **variables,
        )
        spans = [(begin, end) for begin, end in found[0] if end > begin]
        before = sum(message["role"] == ASSISTANT for message in messages[:first])
        if before:
            count = sum(message["role"] == ASSISTANT for message in messages)
            if len(spans) != count:
                raise UserError(
                    f"the chat template marks {len(spans)} texts with {{% generation %}} for {count} answers, so the "
                    "answers of the prompt cannot be left out",
                    remedy="use a conversation without a separate prompt, or a template that marks each answer once",
                )
            spans = spans[before:]
        return str(rendered[0]), spans

    def _answers_by_difference(self, messages: Sequence[Mapping[str, Any]], first: int) -> tuple[str, list[Span]]:
        """Return the text, and as spans what each answer adds to the prompt before it.

        The span ends with the special token that ends the answer, without white space after it.

        Raises:
            UserError: a text is not the beginning of the next one.
        """
        whole = self._text(messages, opens_turn=False)
        spans = []
        for at in range(first, len(messages)):
            if messages[at]["role"] != ASSISTANT:
                continue
            if at == 0:
                raise UserError(
                    "the conversation begins with an answer, and the chat template has no {% generation %} that marks "
                    "it",
                    remedy=_REMEDY,
                )
            prompt = self._text(messages[:at], opens_turn=True)
            answered = self._text(messages[: at + 1], opens_turn=False)
            if not (answered.startswith(prompt) and whole.startswith(answered)):
                raise UserError(
                    f"the chat template has no {{% generation %}} that marks answers, and message {at + 1} of "
                    f"{len(messages)} cannot be told from its prompt: the template writes it in another way when the "
                    "conversation continues",
                    remedy=_REMEDY,
                )
            spans.append((len(prompt), self._end_of_answer(answered)))
        return whole, spans

    def _end_of_answer(self, text: str) -> int:
        """Return the end of an answer at the end of a text: white space after a special token does not belong to it."""
        stripped = text.rstrip()
        return len(stripped) if stripped.endswith(tuple(self._special.ids)) else len(text)

    def _text(self, messages: Sequence[Mapping[str, Any]], *, opens_turn: bool) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                list(messages),
                chat_template=self._prompts.source,
                tokenize=False,
                add_generation_prompt=opens_turn,
                **self._config.chat_template_kwargs,
            )
        )


def _tokens_in(places: Sequence[Span], spans: Sequence[Span]) -> tuple[bool, ...]:
    """Return True for each token from the first to the last one with a character in one of the spans."""
    inside = [False] * len(places)
    for begin, end in spans:
        found = [i for i, (start, stop) in enumerate(places) if start < end and stop > begin]
        if found:
            inside[found[0] : found[-1] + 1] = [True] * (found[-1] + 1 - found[0])
    return tuple(inside)
