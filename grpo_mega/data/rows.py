"""Prompts and answers as their source has them, checked row by row. Imports neither torch nor transformers: what is
wrong with a file is said before they are loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_mega.config.data_sections import DataConfig, DataSource, RowFilter
from grpo_mega.data import arithmetic
from grpo_mega.data.records import read_records
from grpo_mega.types import UserError

Message = Mapping[str, str]
PromptSource = str | Sequence[Message]

_ARITHMETIC = "arithmetic:"
_PROMPT_KEYS = ("prompt", "question")
_MISSING = object()


@dataclass(frozen=True)
class PromptRow:
    """`where` it stands (`file:line`), the prompt and the answer."""

    where: str
    prompt: PromptSource
    answer: str


def keyed_sets(config: DataConfig) -> list[tuple[str, DataSource]]:
    """Every set with the key of the config that names it: `data.train`, or `data.train[1].path`."""
    found = []
    for key, value, sources in (
        ("data.train", config.train, config.train_sets),
        ("data.eval", config.eval, config.eval_sets),
    ):
        found += [(key if isinstance(value, str) else f"{key}[{i}].path", source) for i, source in enumerate(sources)]
    return found


def read_rows(source: DataSource, key: str, config: DataConfig) -> Iterator[PromptRow | None]:
    """The rows of a set, None where a filter leaves one out; `key` is for messages.

    Raises:
        UserError: the file is missing or damaged, a row is malformed, lacks a key or holds a wrong type. Names file and
            row.
    """
    if source.path.startswith(_ARITHMETIC):
        yield from _arithmetic_rows(source, key)
        return
    prompt_key = source.prompt_key or config.prompt_key
    answer_key = source.answer_key or config.answer_key or "answer"
    for where, record in read_records(Path(source.path), key, source.split):
        if all(_passes(where, record, row_filter) for row_filter in source.filters):
            yield PromptRow(where, _prompt_of(where, record, prompt_key), _answer_of(where, record, answer_key))
        else:
            yield None


def check_rows(config: DataConfig) -> None:
    """Read all rows of all sets; raises what `read_rows` raises."""
    for key, source in keyed_sets(config):
        for _ in read_rows(source, key, config):
            pass


def _arithmetic_rows(source: DataSource, key: str) -> Iterator[PromptRow]:
    name = source.path.removeprefix(_ARITHMETIC)
    if name not in ("train", "heldout"):
        raise UserError(
            f"{key}={source.path} is no set of the arithmetic task", remedy="use arithmetic:train or arithmetic:heldout"
        )
    for field in ("split", "prompt_key", "answer_key", "filters"):
        if getattr(source, field):
            raise UserError(f"{key}={source.path}: {field} does nothing with a generated set", remedy="leave it out")
    for index, pair in enumerate(arithmetic.pairs("train" if name == "train" else "heldout")):
        yield PromptRow(f"{source.path}:{index + 1}", arithmetic.question(pair), arithmetic.answer(pair))


def _value(record: Mapping[str, Any], name: str) -> Any:
    """`record[name]`, or for `a.b` key b of the object a; _MISSING where there is none."""
    if name in record:
        return record[name]
    outer, dot, inner = name.partition(".")
    nested = record.get(outer) if dot else None
    return _value(nested, inner) if isinstance(nested, Mapping) else _MISSING


def _passes(where: str, record: dict[str, Any], row_filter: RowFilter) -> bool:
    value = _value(record, row_filter.key)
    if value is _MISSING:
        raise UserError(
            f"{where}: no key {row_filter.key!r} among {sorted(record)}", remedy="correct the filter or the data"
        )
    if row_filter.any_of is not None:
        return value in row_filter.any_of
    if not _is_number(value):
        raise UserError(
            f"{where}: {row_filter.key}={_short(value)} is no finite number, and a filter compares with min and max",
            remedy="correct it, or use any_of",
        )
    low, high = row_filter.min, row_filter.max
    return (low is None or value >= low) and (high is None or value <= high)


def _prompt_of(where: str, record: dict[str, Any], prompt_key: str | None) -> PromptSource:
    accepted = (prompt_key,) if prompt_key else _PROMPT_KEYS
    name = next((name for name in accepted if _value(record, name) is not _MISSING), None)
    if name is None:
        raise UserError(
            f"{where}: no key {' or '.join(repr(name) for name in accepted)} among {sorted(record)}",
            remedy="set data.prompt_key to the one that holds the prompt",
        )
    value = _value(record, name)
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(_is_message(item) for item in value):
        return value
    raise UserError(
        f"{where}: {name}={_short(value)} is neither a string nor a list of {{role, content}} messages",
        remedy="correct it",
    )


def _is_message(item: object) -> bool:
    return isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)


def _answer_of(where: str, record: dict[str, Any], name: str) -> str:
    value = _value(record, name)
    if value is _MISSING:
        raise UserError(
            f"{where}: no key {name!r} among {sorted(record)}",
            remedy="set data.answer_key to the one that holds the answer",
        )
    if _is_number(value):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: {name}={_short(value)} is neither a string nor a number", remedy="correct it")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a character
        raise UserError(
            f"{where}: {name} holds half of a surrogate pair ({error.reason})", remedy="correct it"
        ) from error
    return value


def _is_number(value: object) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and math.isfinite(value)
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
