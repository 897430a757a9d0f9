"""The known name that a mistyped name stands for."""

from __future__ import annotations

import random
from functools import cache

import pytest

from grpo_mega.config.nearest_name import edit_distance, nearest_name


@pytest.mark.parametrize(
    ("name", "known", "found"),
    [
        ("bucket_sise", ["bucket_size", "batch_size"], "bucket_size"),
        ("stric", ["strict", "static"], "strict"),
        ("gsmk8", ["exact", "gsm8k"], "gsm8k"),
        ("Block_Size", ["block_sizes", "block_size"], "block_size"),
        ("ab", ["ba"], None),
        ("abc", ["acb"], "acb"),
        ("loud", ["shout"], None),
        ("zzz", ["exact", "format"], None),
        ("a", [], None),
    ],
)
def test_the_nearest_name_has_the_fewest_edits_and_none_is_suggested_where_none_is_near(
    name: str, known: list[str], found: str | None
) -> None:
    assert nearest_name(name, known) == found


def plain_distance(a: str, b: str) -> int:
    """Return the same distance by the recursion of its definition."""

    @cache
    def of(i: int, j: int) -> int:
        if min(i, j) == 0:
            return max(i, j)
        found = [of(i - 1, j) + 1, of(i, j - 1) + 1, of(i - 1, j - 1) + (a[i - 1] != b[j - 1])]
        if min(i, j) > 1 and a[i - 2 : i] == b[j - 2 : j][::-1]:
            found.append(of(i - 2, j - 2) + 1)
        return min(found)

    return of(len(a), len(b))


def test_the_distance_is_that_of_its_definition() -> None:
    chance = random.Random(0)
    for _ in range(300):
        a, b = ("".join(chance.choices("abc", k=chance.randint(0, 7))) for _ in range(2))
        assert edit_distance(a, b) == plain_distance(a, b), (a, b)
