r"""Regular expressions of a JSON schema, which are those of ECMAScript, as expressions of Python's re.

In ECMAScript `$` is the end of the text, but Python's `$` also matches before a line end at the end. `\d`, `\w` and
`\b` are about ASCII characters there. Asserted by tests/unit/rewards/builtin/test_json_schema.py.
"""

from __future__ import annotations

import re
from typing import Any

_NAMED = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"))
"""Keywords whose value maps names to schemas; the names are no keywords."""
_VALUES = frozenset(("const", "enum", "default", "examples"))
"""Keywords whose value is no schema."""
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?<(?=[A-Za-z_])|\$", re.DOTALL)


def translate_patterns(schema: Any) -> Any:
    """Return a schema with translated patterns.

    Raises:
        ValueError: Python cannot compile a pattern.
    """
    if isinstance(schema, list):
        return [translate_patterns(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "pattern" and isinstance(value, str):
            found[key] = translate_pattern(value)
        elif key in _NAMED and isinstance(value, dict):
            is_pattern = key == "patternProperties"
            found[key] = {
                translate_pattern(name) if is_pattern else name: translate_patterns(each)
                for name, each in value.items()
            }
        else:
            found[key] = value if key in _VALUES else translate_patterns(value)
    return found


def translate_pattern(pattern: str) -> str:
    """Return the expression of Python for one of ECMAScript.

    Raises:
        ValueError: Python cannot compile it.
    """
    translated = _TOKEN.sub(lambda found: {"$": r"\Z", "(?<": "(?P<"}.get(found.group(), found.group()), pattern)
    translated = f"(?a:{translated})"
    try:
        re.compile(translated)
    except re.error as error:
        raise ValueError(f"the pattern {pattern!r} is not supported: {error}") from error
    return translated
