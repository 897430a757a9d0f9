"""docs/architecture.md names every package, and every path in it exists."""

from __future__ import annotations

import re

from tests.helpers.jobs import REPOSITORY

TEXT = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_every_path_of_the_page_exists() -> None:
    paths = set(re.findall(r"`((?:grpo_mega|configs|tools|launch)/[\w./-]*)`", TEXT))
    assert len(paths) > 40
    assert sorted(path for path in paths if not (REPOSITORY / path).exists()) == []


def test_every_package_has_its_own_row() -> None:
    packages = {path.parent.name for path in (REPOSITORY / "grpo_mega").glob("*/__init__.py")}
    rows = re.findall(r"^\| `grpo_mega/(\w+)/` \| \S.*\.", TEXT, re.MULTILINE)
    assert sorted(rows) == sorted(packages)


def test_the_rows_are_in_the_order_of_the_import_layers() -> None:
    layers = re.search(
        r'name = "layers of packages"\n.*?\[\n(.*?)\n\]', (REPOSITORY / "pyproject.toml").read_text(), re.S
    )
    assert layers is not None
    height = {
        name: number
        for number, line in enumerate(layers[1].splitlines())
        for name in re.findall(r"grpo_mega\.(\w+)", line)
    }
    rows = re.findall(r"^\| `grpo_mega/(\w+)/` \|", TEXT, re.MULTILINE)
    assert rows == sorted(rows, key=lambda name: height[name])


def test_the_tour_of_the_repository_names_files_that_exist() -> None:
    tour = (REPOSITORY / "docs" / "decisions" / "newcomers-tour.md").read_text(encoding="utf-8")
    second = tour[tour.index("## Second tour") :]
    found = re.findall(r"`((?:grpo_mega|launch)/[\w./-]*)`", second)
    assert len(found) >= 9
    assert [path for path in found if not (REPOSITORY / path).exists()] == []


def test_the_table_of_changes_names_each_file_of_the_tour() -> None:
    tour = (REPOSITORY / "docs" / "decisions" / "newcomers-tour.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \((\w)\) .*?\| `([\w./-]+)`", tour, re.MULTILINE)
    assert [letter for letter, _ in rows] == list("abcdefghi")
    changes = TEXT[TEXT.index("## Where to change what") :]
    assert [path for _, path in rows if f"`{path}`" not in changes] == []
