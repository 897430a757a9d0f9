"""Files that are never seen half written, and JSON that is always valid."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`: a reader, or a crash at any moment, sees the old file or the new one, whole."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with temporary.open("wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def to_json(value: object, *, indent: int | None = None) -> str:
    """JSON text. A float that is not finite becomes null: `NaN` is not JSON, and many readers refuse the whole file.

    The text is ASCII: a completion may hold lone surrogates, which UTF-8 cannot encode, or U+2028, at which some
    readers cut lines.
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
