"""Contents of the event files of a run, as the readers of TensorBoard find them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from grpo_mega.observe.hyperparameters import COMPARED, hyperparameters
from grpo_mega.observe.metric_table import require_known
from grpo_mega.observe.tensorboard import TensorBoardWriter

CONFIG: dict[str, Any] = {
    "run": {"seed": 3, "dir": "/runs/x"},
    "optimizer": {"lr": 1e-6, "args": {"foreach": True}},
    "algorithm": {"name": "grpo", "kl_target": None},
    "data": {"train": "</pre><script>", "prompts_per_step": 4},
}


def read(path: Path) -> EventAccumulator:
    found = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0, "histograms": 0})
    found.Reload()
    return found


def charts(found: EventAccumulator) -> list[str]:
    event = found.Tensors("custom_scalars__config__")[-1]
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return [chart.title for category in layout.category for chart in category.chart]


def test_a_continued_run_is_one_curve_in_which_discarded_steps_are_cut(tmp_path: Path) -> None:
    first = TensorBoardWriter(tmp_path, first_step=1, config=CONFIG)
    for step in (1, 2, 3, 4):
        first.write(
            step, {"reward/mean": 0.0}, histograms={"reward/distribution": np.zeros(3)}, texts={"alarms": "old"}
        )
    first.write(4, {"train/kl": 9.0})  # only the discarded step has this curve
    first.close()
    second = TensorBoardWriter(tmp_path, first_step=3, names=["reward/mean"], config=CONFIG)
    for step in (3, 4, 5):
        second.write(step, {"reward/mean": 1.0}, histograms={"reward/distribution": np.ones(3)})
    second.close()
    found = read(tmp_path)
    points = [(p.step, p.value) for p in found.Scalars("reward/mean")]
    assert points == [(1, 0.0), (2, 0.0), (3, 1.0), (4, 1.0), (5, 1.0)]
    assert "train/kl" not in found.Tags()["scalars"]
    assert [event.step for event in found.Tensors("alarms/text_summary")] == [1, 2]
    sums = [(event.step, event.histogram_value.sum) for event in found.Histograms("reward/distribution")]
    assert sums == [(1, 0.0), (2, 0.0), (3, 3.0), (4, 3.0), (5, 3.0)]


def test_a_run_that_starts_again_before_its_first_checkpoint_has_one_config_and_one_layout_per_start(
    tmp_path: Path,
) -> None:
    for _ in range(3):
        writer = TensorBoardWriter(tmp_path, first_step=1, config=CONFIG)
        writer.write(1, {"reward/mean": 0.0})
        writer.close()
    found = read(tmp_path)
    assert len(found.Tensors("config/text_summary")) == 1
    assert len(found.Tensors("custom_scalars__config__")) == 1
    assert len(found.Scalars("reward/mean")) == 1


def test_the_dashboard_grows_with_new_curves_and_keeps_those_of_earlier_commands(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path, first_step=1)
    writer.write(1, {"reward/mean": 0.5})
    writer.write(2, {"reward/mean": 0.5, "eval/accuracy": 0.5})
    writer.write(3, {"reward/mean": 0.5})
    writer.close()
    assert charts(read(tmp_path)) == ["reward", "accuracy (fraction)"]
    assert len(read(tmp_path).Tensors("custom_scalars__config__")) == 2
    time.sleep(1.0)  # the name of a file begins with the second; within one, "10" comes before "9"
    writer = TensorBoardWriter(tmp_path, first_step=4, names=["reward/mean", "eval/accuracy"])
    writer.write(4, {"reward/mean": 0.5, "train/kl": 0.5})
    writer.close()
    assert charts(read(tmp_path)) == ["reward", "accuracy (fraction)", "KL to the reference (nats per token)"]


def test_the_config_is_text_in_which_nothing_is_markup(tmp_path: Path) -> None:
    TensorBoardWriter(tmp_path, first_step=1, config=CONFIG).close()
    (event,) = read(tmp_path).Tensors("config/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert "lr: 1.0e-06" in text
    assert "&lt;/pre&gt;&lt;script&gt;" in text
    assert "<script" not in text


def test_hyperparameters_are_the_keys_that_results_depend_on() -> None:
    assert hyperparameters(CONFIG) == {
        "run.seed": 3,
        "optimizer.lr": 1e-6,
        "optimizer.args.foreach": True,
        "algorithm.name": "grpo",
        "data.prompts_per_step": 4,
    }
    require_known(COMPARED)


@pytest.mark.parametrize("done", [True, False])
def test_tensorboard_compares_runs_by_hyperparameters_and_last_metrics(tmp_path: Path, done: bool) -> None:
    writer = TensorBoardWriter(tmp_path, first_step=1, config=CONFIG)
    writer.write(1, {"eval/accuracy": 0.75})
    if done:
        writer.finish()
    writer.close()
    found = read(tmp_path)
    data = {
        tag: HParamsPluginData.FromString(found.SummaryMetadata(tag).plugin_data.content)
        for tag in found.PluginTagToContent("hparams")
    }
    start = data["_hparams_/session_start_info"].session_start_info
    assert start.hparams["optimizer.lr"].number_value == 1e-6
    assert start.hparams["algorithm.name"].string_value == "grpo"
    metrics = data["_hparams_/experiment"].experiment.metric_infos
    assert "eval/accuracy" in [info.name.tag for info in metrics]
    assert ("_hparams_/session_end_info" in data) == done


def test_a_histogram_without_values_is_left_out(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path, first_step=1)
    writer.write(1, {}, histograms={"train/mismatch_distribution": np.zeros(0)})
    writer.close()
    assert read(tmp_path).Tags()["histograms"] == []
