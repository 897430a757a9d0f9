"""Prompts and answers of a data source, checked row by row.

This module imports neither torch nor transformers, so an error in a file is reported before they are loaded.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_mega.config.data_sections import DataConfig, DataSource, RowFilter
from grpo_mega.config.hub_names import data_files, snapshot_folder
from grpo_mega.data import arithmetic
from grpo_mega.data.records import Record, read_records
from grpo_mega.types import UserError

Message = Mapping[str, str]
PromptSource = str | Sequence[Message]

ARITHMETIC = "arithmetic:"
"""Beginning of the path of a generated set."""
_PROMPT_KEYS = ("prompt", "question")
MISSING = object()
"""Value of a key that a row lacks."""


@dataclass(frozen=True)
class PromptRow:
    """A prompt and its answer; `where` is their position (`file:line`). `fields` are the other columns, on request."""

    where: str
    prompt: PromptSource
    answer: str
    fields: Mapping[str, Any] = field(default_factory=dict)


def keyed_sets(config: DataConfig) -> list[tuple[str, DataSource]]:
    """Return every set with its config key: `data.train`, or `data.train[1].path`."""
    found = []
    for key, value, sources in (
        ("data.train", config.train, config.train_sets),
        ("data.eval", config.eval, config.eval_sets),
    ):
        found += [(key if isinstance(value, str) else f"{key}[{i}].path", source) for i, source in enumerate(sources)]
    return found


def read_rows(
    source: DataSource, key: str, config: DataConfig, *, with_fields: bool = False
) -> Iterator[PromptRow | None]:
    """Yield the rows of a set, and None for each row that a filter removes.

    Args:
        source: the set.
        key: its config key, for messages.
        config: the section with the default keys.
        with_fields: keep all other columns (`PromptRow.fields`).

    Raises:
        UserError: the file is missing or damaged, or a row is malformed, lacks a key or has a wrong type. The message
            names file and row.
    """
    if source.path.startswith(ARITHMETIC):
        yield from arithmetic_rows(source, key)
        return
    prompt_key = source.prompt_key or config.prompt_key
    answer_key = source.answer_key or config.answer_key or "answer"
    for where, record in records_of(source, key):
        if all(passes_filter(where, record, row_filter) for row_filter in source.filters):
            prompt, answer = prompt_of(where, record, prompt_key), _answer_of(where, record, answer_key)
            used = {prompt_key or _default_prompt_key(record), answer_key}
            yield PromptRow(where, prompt, answer, _other_fields(record, used) if with_fields else {})
        else:
            yield None


def records_of(source: DataSource, key: str) -> Iterator[Record]:
    """Yield the records of a set, from its file or folder, or from the cached files of the hub.

    Raises:
        UserError: see `read_records`; or the data set of the hub was not fetched.
    """
    if not source.is_on_hub:
        yield from read_records(Path(source.path), key, source.split)
        return
    if source.revision is None:
        raise UserError(
            f"{key}={source.path}: no file or folder of this name exists, and the data set of the hub was not fetched",
            remedy="correct the path, or run `grpo-mega fetch CONFIG`",
        )
    folder = snapshot_folder("dataset", source.path, source.revision)
    for file in data_files(source.path, source.revision, source.config, source.split):
        for where, record in read_records(file, key, None):
            yield where.replace(str(folder), source.path, 1), record


def check_rows(config: DataConfig, *, held_out_only: bool = False) -> None:
    """Read all rows of all sets, or only of `data.eval`; raises the errors of `read_rows`."""
    for key, source in keyed_sets(config):
        if held_out_only and not key.startswith("data.eval"):
            continue
        for _ in read_rows(source, key, config):
            pass


def arithmetic_rows(source: DataSource, key: str) -> Iterator[PromptRow]:
    """Yield the rows of a generated set; raises UserError for an unknown set or a key that does nothing for it."""
    name = source.path.removeprefix(ARITHMETIC)
    if name not in ("train", "heldout"):
        raise UserError(
            f"{key}={source.path} is not a set of the arithmetic task",
            remedy="use arithmetic:train or arithmetic:heldout",
        )
    for name_of_key in ("split", "prompt_key", "answer_key", "filters"):
        if getattr(source, name_of_key):
            raise UserError(f"{key}={source.path}: {name_of_key} has no effect on a generated set", remedy="remove it")
    for index, pair in enumerate(arithmetic.pairs("train" if name == "train" else "heldout")):
        yield PromptRow(f"{source.path}:{index + 1}", arithmetic.question(pair), arithmetic.answer(pair))


def lookup(record: Mapping[str, Any], name: str) -> Any:
    """Return `record[name]`, or for `a.b` key b of the object a; MISSING if there is no such key."""
    if name in record:
        return record[name]
    outer, dot, inner = name.partition(".")
    nested = record.get(outer) if dot else None
    return lookup(nested, inner) if isinstance(nested, Mapping) else MISSING


def passes_filter(where: str, record: Mapping[str, Any], row_filter: RowFilter) -> bool:
    """Return True if the row meets the condition; raises UserError if it lacks the key or has no number there."""
    value = lookup(record, row_filter.key)
    if value is MISSING:
        raise UserError(
            f"{where}: key {row_filter.key!r} of the filter was not found in {sorted(record)}",
            remedy="correct the filter or the data",
        )
    if row_filter.any_of is not None:
        return value in row_filter.any_of
    if not _is_number(value):
        raise UserError(
            f"{where}: {row_filter.key}={shorten(value)} must be a finite number for a filter with min or max",
            remedy="correct it, or use any_of",
        )
    low, high = row_filter.min, row_filter.max
    return (low is None or value >= low) and (high is None or value <= high)


def prompt_of(where: str, record: Mapping[str, Any], prompt_key: str | None) -> PromptSource:
    """Return the prompt of a row; raises UserError if it is missing or neither a string nor a list of messages."""
    name = prompt_key or _default_prompt_key(record)
    if name is None or lookup(record, name) is MISSING:
        accepted = (prompt_key,) if prompt_key else _PROMPT_KEYS
        raise UserError(
            f"{where}: key {' or '.join(repr(name) for name in accepted)} was not found in {sorted(record)}",
            remedy="set data.prompt_key to the key of the prompt",
        )
    value = lookup(record, name)
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(is_message(item) for item in value):
        return value
    raise UserError(
        f"{where}: {name}={shorten(value)} must be a string or a list of {{role, content}} messages",
        remedy="correct it",
    )


def _default_prompt_key(record: Mapping[str, Any]) -> str | None:
    return next((name for name in _PROMPT_KEYS if lookup(record, name) is not MISSING), None)


def _other_fields(record: Mapping[str, Any], used: Container[str | None]) -> dict[str, Any]:
    """Return the other columns as JSON values: dates and decimals as text, bytes as base64."""
    others = {name: value for name, value in record.items() if name not in used}
    found: dict[str, Any] = json.loads(json.dumps(others, default=_as_text))
    return found


def _as_text(value: object) -> str:
    return base64.b64encode(value).decode("ascii") if isinstance(value, bytes) else str(value)


def is_message(item: object) -> bool:
    """Return True for a mapping with a role and a content, both strings."""
    return isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)


def _answer_of(where: str, record: dict[str, Any], name: str) -> str:
    value = lookup(record, name)
    if value is MISSING:
        raise UserError(
            f"{where}: key {name!r} was not found in {sorted(record)}",
            remedy="set data.answer_key to the key of the answer",
        )
    if _is_number(value):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: {name}={shorten(value)} must be a string or a number", remedy="correct it")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can contain half of a surrogate pair
        raise UserError(
            f"{where}: {name} contains half of a surrogate pair ({error.reason})", remedy="correct it"
        ) from error
    return value


def _is_number(value: object) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and math.isfinite(value)
    )


def shorten(value: object) -> str:
    """Return the value for a message, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
