"""Peak memory by phase, and the peak of a process, which is read and reset."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_mega.observe import memory
from grpo_mega.observe.memory import PhasePeaks, device_peak
from grpo_mega.observe.metric_table import require_known
from grpo_mega.types import UserError


def test_a_peak_counts_to_the_phase_that_was_running() -> None:
    taken = iter([1, 5, 7, 4, 3, 2])
    peaks = PhasePeaks(lambda: next(taken))
    peaks.phase("rollout")  # 1: before any phase
    peaks.phase("reward")  # 5
    peaks.phase("rollout")  # 7 counts to the reward; the rollout resumes
    peaks.phase("train")  # 4 of the rollout, which had 5
    found = peaks.step_metrics()  # 3
    assert found == {"memory/peak_rollout_bytes": 5, "memory/peak_reward_bytes": 7, "memory/peak_train_bytes": 3}
    require_known(found)
    assert peaks.step_metrics() == {"memory/peak_train_bytes": 2}


def test_reading_the_peak_of_this_process_resets_it() -> None:
    take = device_peak("cpu")
    take()
    blocks = [bytearray(b"x" * 4096) for _ in range(32 << 8)]  # small ones: freed, they stay with the process
    del blocks
    assert take() >= take() + (16 << 20)


def test_memory_peaks_on_an_unsupported_system_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "missing")
    with pytest.raises(UserError, match=r"observe\.memory_peaks=true needs Linux with glibc, or CUDA"):
        device_peak("cpu")


def test_nothing_is_measured_without_a_reader() -> None:
    peaks = PhasePeaks(None)
    peaks.phase("train")
    assert peaks.step_metrics() == {}
