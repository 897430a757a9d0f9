"""Random models of each family in random layouts give the results of transformers.

The seeds of the long tier are fixed; `python -m tests.helpers.random_sweep FIRST LAST` runs any others.
"""

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
