"""Columns of a step's line."""

from __future__ import annotations

import pytest

from grpo_mega.observe.step_columns import StepColumns, phase_seconds, short_number

RL = {
    "reward/mean": -12.345,
    "eval/accuracy": 0.95,
    "train/entropy": 11.2345,
    "train/mismatch_max": 1.2e-5,
    "train/kl": 0.000123,
    "train/learning_rate": 1e-6,
    "rollout/length_mean": 8192.0,
    "rollout/truncated_fraction": 1.0,
    "throughput/tokens_per_second": 99_999.0,
    "time/step_seconds": 999.9,
}


@pytest.mark.parametrize(("total", "width"), [(50, 78), (999, 80)])
def test_large_numbers_fit_into_aligned_columns_of_80_characters(total: int, width: int) -> None:
    columns = StepColumns(total)
    header, row = columns.header(RL).partition("  seconds")[0], columns.row(total, RL, 9 * 3600.0)
    assert len(header) == len(row) == width
    for label, text in (
        ("held-out", "0.950"),
        ("trunc", "100%"),
        ("tok/s", "99,999"),
        ("ETA", "9h00m"),
        ("s", "999.9"),
    ):
        end = header.rindex(f" {label}") + 1 + len(label)
        assert row[:end].endswith(text), label
    assert "1e-6" not in row  # the learning rate is a column of supervised fine-tuning only


def test_supervised_fine_tuning_has_its_own_columns() -> None:
    metrics = {"train/perplexity": 3.25, "train/learning_rate": 1e-6, "time/step_seconds": 1.0}
    assert StepColumns(9).header(metrics).split()[:5] == ["step", "perplexity", "rate", "s", "ETA"]
    assert StepColumns(9).row(3, metrics, None).split() == ["3/9", "3.250", "1.0e-6", "1.0"]


def test_phases_are_those_of_at_least_half_a_tenth_of_a_second() -> None:
    times = {"time/rollout_seconds": 0.91, "time/sync_seconds": 0.04, "time/step_seconds": 1.0}
    assert phase_seconds(times | {"time/checkpoint_wait_seconds": 0.5}) == "rollout 0.9"


def test_an_exponent_has_no_leading_zero() -> None:
    assert [short_number(value, ".2g") for value in (1.5e-7, 1.2e-4, 0.0012, 1.5e8, 0.0)] == [
        *("1.5e-7", "1.2e-4", "0.0012", "1.5e+8", "0")
    ]
    assert [short_number(value, "#.2g") for value in (1e-4, 0.1, 12.0)] == ["1.0e-4", "0.10", "12"]
