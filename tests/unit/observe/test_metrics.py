"""Lines of metrics.jsonl, curves, and the contract of metric names."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grpo_mega.observe import history
from grpo_mega.observe.background_writer import BackgroundWriter
from grpo_mega.observe.metric_row import SECTIONS
from grpo_mega.observe.metric_table import HISTOGRAMS, METRICS, require_known
from grpo_mega.observe.metrics import MetricsFileError, MetricsWriter
from grpo_mega.observe.ratio_bins import RATIO_LIMITS
from grpo_mega.observe.run_folder import RunFolder
from grpo_mega.observe.tensorboard import TensorBoardWriter
from tests.helpers.observed_rollouts import columns_of_rollouts, make_rollout
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
    "throughput/mfu",
    "sync/bytes",
    "sync/gb_per_second",
    "memory/residual_bytes",
]


@contextmanager
def make_writer(path: Path, *, first_step: int = 1, tensorboard: bool = False) -> Iterator[MetricsWriter]:
    folder = RunFolder(path)
    curves = TensorBoardWriter(folder.tensorboard, first_step=first_step) if tensorboard else None
    with (
        BackgroundWriter() as writer,
        MetricsWriter(folder, writer, first_step=first_step, tensorboard=curves) as metrics,
    ):
        yield metrics


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without their times, which must lie within the last minute."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= time.time() - line.pop("wall_time") < 60 for line in lines)
    return lines


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


def test_a_line_is_on_disk_after_a_flush_with_step_first_and_every_metric(tmp_path: Path) -> None:
    writer = BackgroundWriter()
    metrics = MetricsWriter(RunFolder(tmp_path), writer, first_step=1)
    metrics.write(1, {"reward/mean": 0.25, "train/kl": 1e-9})
    metrics.write(2, {"reward/mean": 1})
    writer.flush()
    lines = read_lines(tmp_path)
    metrics.close()
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text().startswith('{"step": 1, "wall_time": ')
    assert lines == [
        {"step": 1, "reward/mean": 0.25, "train/kl": 1e-9},
        {"step": 2, "reward/mean": 1.0},
    ]


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    with make_writer(tmp_path) as metrics:
        metrics.write(1, {"reward/mean": float("nan"), "train/loss": float("inf"), "train/kl": 0.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert read_lines(tmp_path) == [{"step": 1, "reward/mean": None, "train/loss": None, "train/kl": 0.5}]


def test_a_step_is_written_once_and_a_continued_run_appends(tmp_path: Path) -> None:
    with make_writer(tmp_path) as metrics:
        metrics.write(1, {})
        with pytest.raises(ValueError, match=r"step=1 .* 2$"):
            metrics.write(1, {})
    with make_writer(tmp_path, first_step=2) as metrics:
        with pytest.raises(ValueError, match="step=1 "):
            metrics.write(1, {})
        metrics.write(2, {})
    assert read_lines(tmp_path) == [{"step": 1}, {"step": 2}]


def test_the_evaluations_at_both_ends_have_lines_and_points_once(tmp_path: Path) -> None:
    with make_writer(tmp_path, tensorboard=True) as metrics:
        metrics.write_evaluation(0, "before", {"eval/accuracy": 0.5})
        metrics.write(1, {"reward/mean": 0.25})
        metrics.write(2, {"reward/mean": 0.75})
        metrics.write_evaluation(2, "after", {"eval/accuracy": 1.0})
    with make_writer(tmp_path, first_step=3, tensorboard=True) as metrics:  # killed before its summary was written
        metrics.write_evaluation(2, "after", {"eval/accuracy": 1.0})
    assert read_lines(tmp_path) == [
        {"step": 0, "evaluation": "before", "eval/accuracy": 0.5},
        {"step": 1, "reward/mean": 0.25},
        {"step": 2, "reward/mean": 0.75},
        {"step": 2, "evaluation": "after", "eval/accuracy": 1.0},
    ]
    assert [(p.step, p.value) for p in read_curves(tmp_path).Scalars("eval/accuracy")] == [(0, 0.5), (2, 1.0)]
    assert [step for step, _ in history.read_lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_curves_hold_every_point(tmp_path: Path) -> None:
    with make_writer(tmp_path, tensorboard=True) as metrics:
        metrics.write(1, {"reward/mean": 0.25})
        metrics.write(2, {"reward/mean": 0.75}, ["optimizer.lr: 1 -> <b>"])
        metrics.write_alarms(2, ["the <alarm>"])
    found = read_curves(tmp_path)
    assert [(p.step, p.value) for p in found.Scalars("reward/mean")] == [(1, 0.25), (2, 0.75)]
    for name, text in (("config_changes", b"1 -&gt; &lt;b&gt;"), ("alarms", b"the &lt;alarm&gt;")):
        (event,) = found.Tensors(f"{name}/text_summary")
        assert event.step == 2
        assert text in event.tensor_proto.string_val[0]


def test_rollouts_are_histograms_and_texts_of_their_step(tmp_path: Path) -> None:
    rollouts = [make_rollout(r, f"text {r}") for r in (0.5, 0.0, 1.0)]
    with make_writer(tmp_path, tensorboard=True) as metrics:
        counts = np.ones(len(RATIO_LIMITS))
        columns = columns_of_rollouts(rollouts, [0.0, -1.0, 1.0], group_size=3)
        metrics.show_rollouts(columns, [columns], [0], counts)
    found = read_curves(tmp_path)
    assert set(found.Tags()["histograms"]) == set(HISTOGRAMS) - {"train/mismatch_distribution"}  # it is not known
    (rewards,) = found.Histograms("reward/distribution")
    assert (rewards.step, rewards.histogram_value.num, rewards.histogram_value.sum) == (4, 3, 1.5)
    (text,) = found.Tensors("groups/0/text_summary")
    assert text.step == 4
    assert all(f"text {reward}".encode() in text.tensor_proto.string_val[0] for reward in (0.5, 0.0, 1.0))


def test_the_tensorboard_package_is_imported_only_if_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with make_writer(tmp_path) as metrics:
        metrics.write(1, {})
    assert not (tmp_path / "tensorboard").exists()
    with pytest.raises(ImportError, match=r"observe\.trackers names tensorboard, which is not installed"):
        TensorBoardWriter(tmp_path, first_step=1)


def test_a_line_that_does_not_fit_the_disk_is_named_by_the_next_call(tmp_path: Path) -> None:
    writer = BackgroundWriter()
    metrics = MetricsWriter(RunFolder(tmp_path), writer, first_step=7)
    with Path("/dev/full").open("ab", buffering=0) as full:
        metrics._file.close()
        metrics._file = full
        metrics.write(7, {"reward/mean": 0.25})
        writer.wait()
        expected = r"metrics of step 7 .*/dev/full .*No space left on device.*same command"
        with pytest.raises(MetricsFileError, match=expected):
            metrics.write(8, {"reward/mean": 0.25})
    metrics.close()
    writer.close()
