"""Arguments and references with which every built-in reward can score: for tests that go through all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ARGS: Mapping[str, dict[str, Any]] = {
    "length": {"limit": 1000, "buffer": 200},
    "language_consistency": {"language": "en"},
}
"""Those that have no default."""

REFERENCES: Mapping[str, str] = {
    "countdown": '{"target": 98, "numbers": [44, 19, 35]}',
    "json_schema": '{"type": "object", "required": ["answer"]}',
}
"""Where `steps, then #### 7` is none."""
