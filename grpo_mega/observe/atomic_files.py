"""Atomic file writes, and JSON text that is always valid."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`. A reader, also after a crash, finds the complete old or the complete new file."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with temporary.open("wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def to_json(value: object, *, indent: int | None = None) -> str:
    """Return JSON text. A float that is not finite becomes null: `NaN` is not JSON, and many readers reject it.

    The text is ASCII, because a completion may contain lone surrogates, which UTF-8 cannot encode, or U+2028, which
    some readers take for the end of a line.
    """
    return json.dumps(_finite_or_none(value), indent=indent, allow_nan=False)


def _finite_or_none(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_none(item) for item in value]
    return value
