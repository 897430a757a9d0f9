"""The known name that a mistyped name probably stands for, by edit distance."""

from __future__ import annotations

from collections.abc import Iterable


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Return the known name with the fewest edits to `name`, the first of several; None when none is near.

    An edit inserts, deletes or replaces a character, or exchanges two adjacent ones. A name is near if the edits are at
    most a third of the characters of the longer name. Case does not count.
    """
    best, fewest = None, len(name) + 1
    for each in known:
        most = min(fewest - 1, max(len(name), len(each)) // 3)
        if abs(len(name) - len(each)) <= most and (edits := edit_distance(name.lower(), each.lower())) <= most:
            best, fewest = each, edits
    return best


def edit_distance(a: str, b: str) -> int:
    """Return the optimal string alignment distance of two texts.

    Source: Damerau, "A technique for computer detection and correction of spelling errors", 1964.
    """
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        earlier, before, row = before, row, [i]
        for j, right in enumerate(b, 1):
            edits = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (left != right))
            if i > 1 and j > 1 and left == b[j - 2] and a[i - 2] == right:
                edits = min(edits, earlier[j - 2] + 1)
            row.append(edits)
    return row[-1]
