"""Commands and files in the guides, in the form that a reader would type them."""

from __future__ import annotations

import re
from pathlib import Path

from tests.helpers.jobs import REPOSITORY

_BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
_YAML = re.compile(r"^```yaml\n# (\S+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PYTHON = re.compile(r"^```python\n# (\S+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def shell_blocks(guide: str) -> list[str]:
    """Return the fenced shell blocks of `docs/GUIDE`, in order."""
    return _BLOCK.findall((REPOSITORY / "docs" / guide).read_text(encoding="utf-8"))


def command_pages() -> list[Path]:
    """Return the pages of `docs/` with commands. Measurements and decisions report past results."""
    return sorted(path for path in (REPOSITORY / "docs").glob("*.md") if _BLOCK.search(path.read_text("utf-8")))


def python_blocks(guide: str) -> dict[str, str]:
    """Return the fenced Python blocks of `docs/GUIDE` by the name in their first line, a comment."""
    return dict(_PYTHON.findall((REPOSITORY / "docs" / guide).read_text(encoding="utf-8")))


def yaml_blocks(guide: str) -> dict[str, str]:
    """Return the fenced YAML blocks of `docs/GUIDE` by the name in their first line, a comment."""
    return dict(_YAML.findall((REPOSITORY / "docs" / guide).read_text(encoding="utf-8")))
