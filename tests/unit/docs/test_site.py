"""The documentation is a site without broken links, and its navigation has every page."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.jobs import REPOSITORY, clean_environment
from tools.dev.mkdocs_links import without_outside_links


def navigation_pages(nav: list[Any]) -> Iterator[str]:
    """Yield the paths of a navigation in the format of mkdocs.yml."""
    for entry in nav:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            if isinstance(value, list):
                yield from navigation_pages(value)
            else:
                yield value


def test_the_navigation_has_every_page_once() -> None:
    site = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    docs = REPOSITORY / "docs"
    assert sorted(navigation_pages(site["nav"])) == sorted(str(path.relative_to(docs)) for path in docs.rglob("*.md"))


def test_a_link_to_a_file_outside_the_documentation_becomes_a_path() -> None:
    text = "[loop.py](../grpo_mega/trainer/loop.py#L3), [`types.py`](../grpo_mega/types.py), [here](guides/index.md)"
    found = without_outside_links(text, "page.md")
    assert found == "`grpo_mega/trainer/loop.py`, `grpo_mega/types.py`, [here](guides/index.md)"
    assert without_outside_links("[a](../data.md)", "guides/page.md") == "[a](../data.md)"


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs mkdocs of the extra `dev`")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=REPOSITORY,
        env={**clean_environment(), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "site" / "guides" / "engine.html").is_file()
