"""Pictures of the documentation equal the output of their scripts."""

from __future__ import annotations

import re

from tests.helpers.jobs import REPOSITORY
from tools.dev import draw_step


def test_the_picture_of_a_step_equals_the_output_of_its_script() -> None:
    assert draw_step.PICTURE.read_text(encoding="utf-8") == draw_step.picture()


def test_readme_is_short_and_its_links_and_pictures_exist() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    links = [link.split("#")[0] for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text)]
    assert "docs/assets/step.svg" in links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []
