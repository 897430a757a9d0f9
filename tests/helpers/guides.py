"""The commands of the guides, as a reader would type them."""

from __future__ import annotations

import re
from pathlib import Path

from tests.helpers.jobs import REPOSITORY

_BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(guide: str) -> list[str]:
    """The fenced shell blocks of `docs/GUIDE`, in order."""
    return _BLOCK.findall((REPOSITORY / "docs" / guide).read_text(encoding="utf-8"))


def guides() -> list[Path]:
    """Those with commands; measurements and decisions tell what was done, not what to do."""
    return sorted(path for path in (REPOSITORY / "docs").glob("*.md") if _BLOCK.search(path.read_text("utf-8")))
