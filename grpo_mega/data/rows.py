"""Prompts and answers as their source has them, checked line by line. Imports neither torch nor transformers: what is
wrong with a file is said before they are loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_mega.config.schema import DataConfig
from grpo_mega.data import arithmetic
from grpo_mega.types import UserError

Message = Mapping[str, str]
PromptSource = str | Sequence[Message]
Row = tuple[str, PromptSource, str]
"""Where it stands (`file:line`), the prompt, the answer."""

_ARITHMETIC = "arithmetic:"
_PROMPT_KEYS = ("prompt", "question")


def read_rows(source: str, key: str, config: DataConfig) -> Iterator[Row]:
    """The rows of a JSONL file, or of `arithmetic:train` / `arithmetic:heldout`; `key` is for messages.

    Raises:
        UserError: the file is missing, a line is malformed, lacks a key or holds a wrong type. Names file and line.
    """
    return _arithmetic_rows(source, key) if source.startswith(_ARITHMETIC) else _jsonl_rows(source, key, config)


def source_key(source: str, config: DataConfig) -> str:
    """The key of the config that names `source`."""
    return "data.eval" if source == config.eval and source != config.train else "data.train"


def check_rows(source: str, config: DataConfig) -> None:
    """Read all rows of `source`; raises what `read_rows` raises."""
    for _ in read_rows(source, source_key(source, config), config):
        pass


def _arithmetic_rows(source: str, key: str) -> Iterator[Row]:
    name = source.removeprefix(_ARITHMETIC)
    if name not in ("train", "heldout"):
        raise UserError(f"{key}={source} is no set of the arithmetic task; use arithmetic:train or arithmetic:heldout")
    for index, pair in enumerate(arithmetic.pairs("train" if name == "train" else "heldout")):
        yield f"{source}:{index + 1}", arithmetic.question(pair), arithmetic.answer(pair)


def _jsonl_rows(source: str, key: str, config: DataConfig) -> Iterator[Row]:
    path = Path(source)
    if not path.is_file():
        raise UserError(_missing(path, key))
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}:{number}"
                record = _parse(where, line)
                yield where, _prompt_of(where, record, config), _answer_of(where, record, config)


def _missing(path: Path, key: str) -> str:
    if path.exists():
        return f"{key}={path} is not a file; give a JSONL file"
    if "gsm8k" in path.parts and path.name in ("train.jsonl", "test.jsonl"):
        return (
            f"{key}={path}: no such file; put GSM8K's {path.name} there (grade_school_math/data/{path.name} of "
            f"openai/grade-school-math), or set {key} to where it is"
        )
    return (
        f"{key}={path}: no such file; give a JSONL file with a prompt and an answer per line, or arithmetic:train / "
        f"arithmetic:heldout"
    )


def _parse(where: str, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except ValueError as error:  # malformed JSON or UTF-8
        raise UserError(f"{where}: not valid JSON ({error}); each line is one JSON object") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: got a {type(record).__name__}; each line is one JSON object")
    return record


def _prompt_of(where: str, record: dict[str, Any], config: DataConfig) -> PromptSource:
    accepted = (config.prompt_key,) if config.prompt_key else _PROMPT_KEYS
    name = next((name for name in accepted if name in record), None)
    if name is None:
        raise UserError(
            f"{where}: no key {' or '.join(repr(name) for name in accepted)} among {sorted(record)}; set "
            f"data.prompt_key to the one that holds the prompt"
        )
    value = record[name]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(_is_message(item) for item in value):
        return value
    raise UserError(
        f"{where}: {name}={_short(value)} is neither a string nor a list of {{role, content}} messages; correct it"
    )


def _is_message(item: object) -> bool:
    return isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)


def _answer_of(where: str, record: dict[str, Any], config: DataConfig) -> str:
    name = config.answer_key or "answer"
    if name not in record:
        raise UserError(
            f"{where}: no key {name!r} among {sorted(record)}; set data.answer_key to the one that holds the answer"
        )
    value = record[name]
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"{where}: {name}={_short(value)} is neither a string nor a number; correct it")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
