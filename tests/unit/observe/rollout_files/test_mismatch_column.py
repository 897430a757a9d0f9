"""Log-probs of the policy as rounded differences from those of the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from grpo_mega.observe.rollout_files.mismatch_column import rounded_differences
from grpo_mega.observe.rollout_files.reader import read_rows, read_step
from tests.helpers.step_columns import write_step

SAMPLED = [-0.5, -0.25, -0.125]


def as_floats(values: list[float]) -> list[float]:
    numbers = np.array(values, np.float32)
    found: list[float] = rounded_differences(numbers, np.zeros_like(numbers)).astype(float).tolist()
    return found


def test_numbers_are_rounded_to_five_significant_bits_halves_to_even() -> None:
    # 33 and 35 are between the multiples of 2 from 32 to 64: 33 is as far from 32 as from 34
    assert as_floats([1.0, 31.0, 33.0, 35.0, -33.5, 0.0, 63.9]) == [1.0, 31.0, 32.0, 36.0, -34.0, 0.0, 64.0]
    values = np.random.default_rng(0).normal(size=10_000) * 10.0 ** np.random.default_rng(1).uniform(-4, 4, 10_000)
    values = values.astype(np.float32)[np.abs(values) > 6.2e-5].astype(np.float64)
    errors = np.abs(np.array(as_floats(values.tolist())) / values - 1)
    assert 1 / 35 < errors.max() <= 1 / 32
    small = np.linspace(-6e-5, 6e-5, 1001).astype(np.float32).astype(np.float64)
    assert np.abs(np.array(as_floats(small.tolist())) - small).max() <= np.abs(small).max() / 32
    tiny = np.array([2e-8, 4e-8, 1e-6, 1.03e-6], np.float32).astype(np.float64)
    assert np.abs(np.array(as_floats(tiny.tolist())) - tiny).max() <= 6.1e-8


def test_numbers_that_are_not_finite_stay_so() -> None:
    found = as_floats([np.inf, -np.inf, np.nan, -np.nan, 7e4])
    assert found[:2] == [np.inf, -np.inf]
    assert np.isnan(found[2:4]).all()
    assert found[4] == np.inf


@pytest.mark.parametrize(
    "rows",
    [
        [{"old_log_probs": [-0.5, -0.25, -0.12]}, {"old_log_probs": None}, {"old_log_probs": [-9.0, -0.25, 0.0]}],
        [{"old_log_probs": None}, {"old_log_probs": None}],
        [{"old_log_probs": [-1e-3, -3.0, -40.0]}],
    ],
)
def test_readers_get_the_log_probs_back_up_to_the_rounding(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    folder = write_step(tmp_path, 1, rows)
    for row, given in zip(read_rows(folder), rows, strict=True):
        assert row["sampler_log_probs"] == SAMPLED
        assert "mismatch" not in row
        if given["old_log_probs"] is None:
            assert row["old_log_probs"] is None
            continue
        mismatch = np.array(given["old_log_probs"]) - SAMPLED
        assert np.abs(np.array(row["old_log_probs"]) - given["old_log_probs"]).max() <= np.abs(mismatch).max() / 32
    (file,) = folder.glob("*.parquet")
    assert "mismatch" in pq.read_schema(file).names
    assert "old_log_probs" not in pq.read_schema(file).names


def test_a_reader_may_ask_for_the_policy_alone(tmp_path: Path) -> None:
    folder = write_step(tmp_path, 1, [{"old_log_probs": [-1.0, -0.25, -0.125]}])
    table = read_step(folder, ["group", "old_log_probs"]).table
    assert table.to_pydict() == {"group": [0], "old_log_probs": [[-1.0, -0.25, -0.125]]}
    assert read_step(folder, ["group"]).table.column_names == ["group"]


def test_a_small_mismatch_takes_about_a_byte(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sampled = -rng.exponential(0.5, 100_000).astype(np.float32)
    old = (sampled + rng.normal(0, 0.01, len(sampled))).astype(np.float32)
    tokens = {"completion_ids": [7] * len(sampled), "sampler_log_probs": sampled.tolist()}
    sizes = []
    for number, known in enumerate((None, old.tolist()), 1):
        (file,) = write_step(tmp_path, number, [tokens | {"old_log_probs": known}]).glob("*.parquet")
        sizes.append(file.stat().st_size)
    assert 0.8 < (sizes[1] - sizes[0]) / len(sampled) < 1.2
