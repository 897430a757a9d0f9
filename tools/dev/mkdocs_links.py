"""Hook of mkdocs.yml: a link to a file of the repository outside docs/ becomes its path, in code.

In the repository these links open the file. The site has no such file, and the repository has no fixed address.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

_LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")


def without_outside_links(markdown: str, source: str) -> str:
    """Return the text of the page `source` (its path inside docs/) without links that leave docs/."""

    def replaced(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), match[2]))
        if target.startswith("docs/"):
            return match[0]
        text = match[1].strip("`")
        return f"`{target}`" if text in target else f"{match[1]} (`{target}`)"

    return _LINK.sub(replaced, markdown)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Event of MkDocs: the text of a page before it is rendered."""
    return without_outside_links(markdown, page.file.src_uri)
