"""Lines of metrics.jsonl, curves, and the contract of metric names."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grpo_mega.observe.metric_table import METRICS, SECTIONS, require_known
from grpo_mega.observe.metrics import MetricsWriter
from grpo_mega.observe.run_folder import RunFolder
from tools.dev.make_metrics_reference import REFERENCE, reference

# The names that scripts rely on; a change here breaks them.
STABLE_NAMES = [
    "reward/mean",
    "reward/std",
    "reward/accuracy",
    "rollout/length_mean",
    "rollout/truncated_fraction",
    "group/degenerate_fraction",
    "train/loss",
    "train/kl",
    "train/entropy",
    "train/clip_fraction",
    "train/grad_norm",
    "train/mismatch_kl",
    "time/rollout_seconds",
    "time/reward_seconds",
    "time/log_probs_seconds",
    "time/train_seconds",
    "time/sync_seconds",
    "time/checkpoint_seconds",
    "time/step_seconds",
    "throughput/tokens_per_second",
    "sync/bytes",
    "sync/gb_per_second",
    "memory/residual_bytes",
]


def make_writer(path: Path, *, first_step: int = 1, tensorboard: bool = False) -> MetricsWriter:
    return MetricsWriter(RunFolder(path), first_step=first_step, tensorboard=tensorboard, rollouts_shown=2)


def read_curves(path: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(path / "tensorboard"), purge_orphaned_data=True)
    accumulator.Reload()
    return accumulator


def test_the_stable_names_are_known_and_every_name_has_unit_meaning_and_condition() -> None:
    require_known(STABLE_NAMES)
    assert all(m.chart and m.unit and m.meaning and m.when for m in METRICS.values())


def test_every_section_has_metrics_and_the_metrics_of_a_chart_have_one_unit() -> None:
    assert {m.section for m in METRICS.values()} == set(SECTIONS)
    units: dict[tuple[str, str], set[str]] = {}
    for metric in METRICS.values():
        units.setdefault((metric.section, metric.chart), set()).add(metric.unit)
    assert {chart: found for chart, found in units.items() if len(found) > 1} == {}


def test_the_committed_reference_is_up_to_date() -> None:
    assert REFERENCE.read_text() == reference(), "run python tools/dev/make_metrics_reference.py"


def test_an_unknown_name_is_an_error_with_the_nearest_name(tmp_path: Path) -> None:
    with make_writer(tmp_path) as metrics, pytest.raises(ValueError, match=r"metric=reward/avg .* use reward/"):
        metrics.write(1, {"reward/avg": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_line_is_on_disk_at_once_with_step_first_and_every_metric(tmp_path: Path) -> None:
    metrics = make_writer(tmp_path)
    metrics.write(1, {"reward/mean": 0.25, "train/kl": 1e-9})
    metrics.write(2, {"reward/mean": 1})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    metrics.close()
    assert lines[0].startswith('{"step": 1, ')
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "reward/mean": 0.25, "train/kl": 1e-9},
        {"step": 2, "reward/mean": 1.0},
    ]


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    with make_writer(tmp_path) as metrics:
        metrics.write(1, {"reward/mean": float("nan"), "train/loss": float("inf"), "train/kl": 0.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text) == {"step": 1, "reward/mean": None, "train/loss": None, "train/kl": 0.5}


def test_a_step_is_written_once_and_a_continued_run_appends(tmp_path: Path) -> None:
    with make_writer(tmp_path) as metrics:
        metrics.write(1, {})
        with pytest.raises(ValueError, match=r"step=1 .* 2$"):
            metrics.write(1, {})
    with make_writer(tmp_path, first_step=2) as metrics:
        with pytest.raises(ValueError, match="step=1 "):
            metrics.write(1, {})
        metrics.write(2, {})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_curves_hold_every_point_and_those_without_a_line(tmp_path: Path) -> None:
    with make_writer(tmp_path, tensorboard=True) as metrics:
        metrics.write_curves(0, {"eval/accuracy": 0.5})
        metrics.write(1, {"reward/mean": 0.25})
        metrics.write(2, {"reward/mean": 0.75})
    found = read_curves(tmp_path)
    assert [(p.step, p.value) for p in found.Scalars("reward/mean")] == [(1, 0.25), (2, 0.75)]
    assert [(p.step, p.value) for p in found.Scalars("eval/accuracy")] == [(0, 0.5)]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


def test_tensorboard_hides_the_points_that_a_continued_run_writes_again(tmp_path: Path) -> None:
    with make_writer(tmp_path, tensorboard=True) as metrics:
        for step in (1, 2, 3):
            metrics.write(step, {"reward/mean": 0.0})
    with make_writer(tmp_path, first_step=2, tensorboard=True) as metrics:
        metrics.write(2, {"reward/mean": 1.0})
    assert [(p.step, p.value) for p in read_curves(tmp_path).Scalars("reward/mean")] == [(1, 0.0), (2, 1.0)]


def test_the_tensorboard_package_is_imported_only_if_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with make_writer(tmp_path) as metrics:
        metrics.write(1, {})
    assert not (tmp_path / "tensorboard").exists()
    with pytest.raises(ImportError, match=r"observe\.tensorboard=true needs tensorboard"):
        make_writer(tmp_path, tensorboard=True)
