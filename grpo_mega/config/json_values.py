"""Checks that a value from YAML is plain data: JSON returns it unchanged, and no alias stands inside its own value.

Arguments of rewards and environments reach worker processes as JSON, and the resolved config is written as plain data.
YAML can also write dates, binary data, sets, keys that are no text, and values without an end.
Asserted by tests/unit/config/test_json_values.py.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from grpo_mega.types import UserError

_SCALARS = (bool, int, float, str, type(None))


def require_json_values(where: str, values: Mapping[str, Any], *, text_keys: bool = True) -> None:
    """Check that JSON returns every value unchanged.

    Args:
        where: config key of the mapping, for messages.
        values: name -> value, as YAML gave them.
        text_keys: require text as the key of every inner mapping, because JSON turns a number there into text. False:
            numbers are accepted.

    Raises:
        UserError: names the key of the first part that JSON cannot hold, and how to write it.
    """

    def check(key: str, value: Any) -> None:
        if isinstance(value, dict):
            for name in value:
                if type(name) is not str and (text_keys or type(name) not in _SCALARS):
                    raise UserError(
                        f"{key}: the key {name!r} of this mapping is of type {type(name).__name__}, and must be text",
                        remedy=f'put quotes around it: "{name}"',
                    )
        elif type(value) is not list and type(value) not in _SCALARS:
            is_date = isinstance(value, datetime.date)  # also a datetime
            raise UserError(
                f"{key}={value if is_date else repr(value)}: YAML reads a value of type {type(value).__name__}, which "
                "cannot be passed on",
                remedy=f'put quotes around it: "{value}"' if is_date else "use text, numbers, lists and mappings",
            )

    for name, value in values.items():
        _visit(f"{where}.{name}", value, check)


def reject_endless_values(values: Mapping[Any, Any]) -> None:
    """Check that no YAML alias stands inside the value that it names.

    Raises:
        UserError: names the key of the alias.
    """
    for name, value in values.items():
        _visit(str(name), value, lambda key, part: None)


def _visit(key: str, value: Any, check: Callable[[str, Any], None]) -> None:
    """Call `check` with the key and the value of every part, each once, however many aliases it has."""
    open_parts: set[int] = set()
    done: set[int] = set()

    def visit(key: str, value: Any) -> None:
        if id(value) in open_parts:
            raise UserError(
                f"{key}: this YAML alias stands inside the value that it names, so the value has no end",
                remedy=f"write the value of {key} without an alias",
            )
        check(key, value)
        if id(value) in done or not isinstance(value, dict | list | tuple):
            return
        open_parts.add(id(value))
        for part_key, part in _parts(key, value):
            visit(part_key, part)
        open_parts.remove(id(value))
        done.add(id(value))

    visit(key, value)


def _parts(key: str, value: dict[Any, Any] | list[Any] | tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"{key}.{name}", part) for name, part in value.items())
    else:
        yield from ((f"{key}[{position}]", part) for position, part in enumerate(value))
