"""Bins of probability ratios, and their histogram in TensorBoard."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grpo_mega.observe.ratio_bins import RATIO_LIMITS
from grpo_mega.observe.tensorboard import TensorBoardWriter


def test_the_bin_around_1_is_narrow_and_the_limits_ascend() -> None:
    assert list(RATIO_LIMITS) == sorted(set(RATIO_LIMITS))
    places = torch.bucketize(torch.tensor([1.0, 1 + 2e-5, 1 - 2e-5, 0.0, 1e30]), torch.tensor(RATIO_LIMITS[:-1]))
    middle = len(RATIO_LIMITS) // 2
    assert places[0] == middle
    assert places[1] == middle + 2  # 10^(1/4) x 1e-5 < 2e-5 < 10^(2/4) x 1e-5
    assert places[2] == middle - 2
    assert places[3:].tolist() == [0, len(RATIO_LIMITS) - 1]
    assert math.log(RATIO_LIMITS[-1]) > 2.3  # a ratio of 10


def test_tensorboard_shows_the_counts(tmp_path: Path) -> None:
    counts = np.zeros(len(RATIO_LIMITS))
    middle = len(counts) // 2
    counts[middle], counts[-1] = 6, 2
    writer = TensorBoardWriter(tmp_path, first_step=1)
    writer.write_counts(3, "train/ratio_distribution", RATIO_LIMITS, counts)
    writer.write_counts(4, "train/ratio_distribution", RATIO_LIMITS, np.zeros(0))
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (found,) = events.Histograms("train/ratio_distribution")
    assert (found.step, found.histogram_value.num) == (3, 8)
    assert found.histogram_value.max == RATIO_LIMITS[-1]
    assert abs(found.histogram_value.bucket_limit[0] - 1) < 2e-5
    assert sum(found.histogram_value.bucket) == 8
