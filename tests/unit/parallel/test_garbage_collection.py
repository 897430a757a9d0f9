"""Collections of reference cycles: rare during a start, as usual afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from grpo_mega.parallel import garbage_collection


class Cycle:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    gc.set_threshold(*garbage_collection._USUAL)  # another test may have begun a start in this process
    yield
    gc.set_threshold(*garbage_collection._USUAL)
    gc.unfreeze()


def num_collections() -> int:
    return sum(each["collections"] for each in gc.get_stats())


def test_a_start_makes_few_collections_and_then_they_are_as_before() -> None:
    usual = gc.get_threshold()
    garbage_collection.collect_rarely()
    before = num_collections()
    kept = [Cycle() for _ in range(20_000)]
    assert num_collections() == before
    garbage_collection.end_start()
    assert gc.get_threshold() == usual
    assert gc.get_freeze_count() > len(kept), "what lives is not examined again"
    before = num_collections()
    del kept
    lost = [Cycle() for _ in range(20_000)]
    assert num_collections() > before
    del lost
