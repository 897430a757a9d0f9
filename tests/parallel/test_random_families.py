"""Random models of each family in random layouts train as transformers does: the seeds of the long tier are fixed, any
other is tried by `python -m tests.helpers.random_sweep SEED ...`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.family_updates import is_within, measure_random
from tests.helpers.ranks import RankPool


@pytest.mark.long
@pytest.mark.parametrize("seed", range(24))
def test_a_random_model_in_a_random_layout_equals_transformers(rank_pool: RankPool, tmp_path: Path, seed: int) -> None:
    found, rounding = measure_random(rank_pool, tmp_path, seed)
    assert is_within(found, rounding), (found, rounding)
