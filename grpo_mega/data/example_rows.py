"""Examples of supervised fine-tuning in a data source, checked row by row.

A row is a conversation (`messages`), of which all answers are trained, or a prompt with a completion, of which only the
completion is trained. Like prompt_rows.py, this module imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_mega.config.data_sections import DataConfig, DataSource
from grpo_mega.data.prompt_rows import (
    ARITHMETIC,
    MISSING,
    Message,
    arithmetic_rows,
    is_message,
    keyed_sets,
    lookup,
    passes_filter,
    prompt_of,
    records_of,
    shorten,
)
from grpo_mega.types import UserError

ASSISTANT = "assistant"
_MESSAGES_KEY, _COMPLETION_KEY = "messages", "completion"


@dataclass(frozen=True)
class ExampleRow:
    """The messages of an example, at the position `where` (`file:line`). Only answers in `completion` are trained.

    `prompt` is empty in a conversation.
    """

    where: str
    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]


def example_sets(config: DataConfig) -> list[tuple[str, DataSource]]:
    """Return the sets of `data.train` with their config keys."""
    return [(key, source) for key, source in keyed_sets(config) if key.startswith("data.train")]


def check_example_rows(config: DataConfig) -> None:
    """Read all rows of the sets of `data.train`; raises the errors of `read_examples`."""
    for key, source in example_sets(config):
        for _ in read_examples(source, key, config):
            pass


def read_examples(source: DataSource, key: str, config: DataConfig) -> Iterator[ExampleRow | None]:
    """Yield the examples of a set, and None for each row that a filter removes.

    Args:
        source: the set.
        key: its config key, for messages.
        config: the section with the keys of a row.

    Raises:
        UserError: the file is missing or damaged, or a row is malformed, lacks a key, or has no answer or an empty one.
            The message names file and row.
    """
    if source.path.startswith(ARITHMETIC):
        for generated in arithmetic_rows(source, key):
            assert isinstance(generated.prompt, str), "a generated prompt is a text"
            prompt, answer = _message("user", generated.prompt), _message(ASSISTANT, generated.answer)
            yield ExampleRow(generated.where, (prompt,), (answer,))
        return
    prompt_key = source.prompt_key or config.prompt_key
    for where, record in records_of(source, key):
        if all(passes_filter(where, record, row_filter) for row_filter in source.filters):
            row = _example_of(where, record, prompt_key, config)
            _check_answers(row)
            yield row
        else:
            yield None


def _example_of(where: str, record: Mapping[str, Any], prompt_key: str | None, config: DataConfig) -> ExampleRow:
    messages_key = config.messages_key or _MESSAGES_KEY
    has_messages = lookup(record, messages_key) is not MISSING
    if config.messages_key is not None or (has_messages and config.completion_key is None and prompt_key is None):
        return ExampleRow(where, (), _messages_of(where, messages_key, lookup(record, messages_key), record))
    completion_key = config.completion_key or _COMPLETION_KEY
    value = lookup(record, completion_key)
    if value is MISSING:
        raise UserError(
            f"{where}: neither a conversation {messages_key!r} nor an answer {completion_key!r} was found in "
            f"{sorted(record)}",
            remedy="set data.messages_key or data.completion_key to the key of the one that the rows have",
        )
    prompt = prompt_of(where, record, prompt_key)
    if isinstance(value, str):
        completion: tuple[Message, ...] = (_message(ASSISTANT, value),)
    else:
        completion = _messages_of(where, completion_key, value, record)
    return ExampleRow(where, (_message("user", prompt),) if isinstance(prompt, str) else tuple(prompt), completion)


def _messages_of(where: str, key: str, value: object, record: Mapping[str, Any]) -> tuple[Message, ...]:
    if value is MISSING:
        raise UserError(
            f"{where}: key {key!r} was not found in {sorted(record)}",
            remedy="set data.messages_key to the key of the conversation",
        )
    if not (isinstance(value, list) and value and all(is_message(item) for item in value)):
        raise UserError(
            f"{where}: {key}={shorten(value)} must be a list of {{role, content}} messages, both strings",
            remedy="correct the row",
        )
    return tuple(value)


def _check_answers(row: ExampleRow) -> None:
    """Raise UserError if there is no answer to train on, or an empty one."""
    answers = [message for message in row.completion if message["role"] == ASSISTANT]
    if not answers:
        raise UserError(
            f"{row.where}: no message has the role {ASSISTANT!r} (roles: {_roles(row.completion)}), so there is "
            "nothing to train on",
            remedy="correct the roles, or remove the row",
        )
    for number, answer in enumerate(answers, 1):
        if not answer["content"].strip() and not answer.get("tool_calls"):
            raise UserError(
                f"{row.where}: answer {number} of {len(answers)} is empty (content={answer['content']!r})",
                remedy="write the answer, or remove the row",
            )


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(dict.fromkeys(message["role"] for message in messages))


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
