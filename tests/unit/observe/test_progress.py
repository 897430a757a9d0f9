"""The display of a run, live and plain."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections import deque
from pathlib import Path

import pytest

from grpo_mega.observe.log import configure_logging
from grpo_mega.observe.progress import Progress, sparkline

STEP: dict[str, float] = {
    "reward/mean": 0.41,
    "reward/accuracy": 0.4,
    "rollout/length_mean": 3.2,
    "train/kl": 0.0012,
    "train/mismatch_max": 3e-7,
    "throughput/tokens_per_second": 1234.4,
    "time/rollout_seconds": 0.9,
    "time/reward_seconds": 0.01,
    "time/train_seconds": 1.0,
    "time/sync_seconds": 0.1,
    "time/step_seconds": 2.0,
}
FULL = STEP | {"train/entropy": 1.2344, "rollout/truncated_fraction": 0.01}


def test_a_step_is_one_plain_line_when_piped() -> None:
    stream = io.StringIO()
    with Progress(total_steps=112, first_step=12, stream=stream) as progress:
        progress.phase("rollout")
        progress.held_out(0, 0.478)
        progress.step(12, STEP)
        progress.note("checkpoint [12] saved")
        progress.step(13, STEP | {"eval/accuracy": 0.5, "time/evaluation_seconds": 2.0})
    assert stream.getvalue().splitlines() == [
        "   step reward held-out mismatch     kl length  tok/s     s    ETA  seconds by phase",
        " 12/112   0.41    0.478     3e-7 0.0012    3.2  1,234   2.0  3m20s  rollout 0.9 train 1.0 sync 0.1",
        "checkpoint [12] saved",
        " 13/112   0.41    0.500     3e-7 0.0012    3.2  1,234   2.0  3m18s  rollout 0.9 train 1.0 sync 0.1 "
        "evaluation 2.0",
    ]


def test_missing_metrics_are_not_shown() -> None:
    stream = io.StringIO()
    Progress(total_steps=3, stream=stream).step(1, {"reward/mean": float("nan")})
    assert [line.rstrip() for line in stream.getvalue().splitlines()] == [
        "step reward    ETA  seconds by phase",
        " 1/3    nan",
    ]


def test_the_header_is_repeated_after_25_steps_and_when_the_columns_change() -> None:
    stream = io.StringIO()
    progress = Progress(total_steps=99, stream=stream)
    for step in range(1, 27):
        progress.step(step, {"reward/mean": 0.5})
    progress.step(27, {"reward/mean": 0.5, "eval/accuracy": 0.5})
    progress.step(28, {"reward/mean": 0.5})
    lines = stream.getvalue().splitlines()
    assert [i for i, line in enumerate(lines) if "reward" in line] == [0, 26, 28]
    assert "0.500" in lines[-1]  # the last held-out accuracy stays


def test_the_eta_follows_the_last_twenty_steps() -> None:
    stream = io.StringIO()
    progress = Progress(total_steps=121, stream=stream)
    progress.step(1, {"time/step_seconds": 1000.0})
    for step in range(2, 22):
        progress.step(step, {"time/step_seconds": 3.0})
    assert stream.getvalue().splitlines()[-1].endswith("5m00s")


def test_a_terminal_shows_bar_rows_trend_and_the_current_phase_within_80_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = io.StringIO()
    with Progress(total_steps=124, stream=stream, terminal=True) as progress:
        progress.held_out(0, 0.478)
        progress.step(11, FULL | {"reward/mean": 0.25, "eval/accuracy": 0.75})
        progress.step(12, FULL)
        progress.phase("evaluation")
        progress.note("[bold] is text, \x1b[2J does nothing")
    shown = stream.getvalue()
    assert "\x1b[2J" not in shown
    assert "[bold] is text, \\x1b[2J does nothing" in shown
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).rpartition("step 12/124")[2].splitlines()
    assert "━" in last[0]
    assert [line.rstrip() for line in last[1:6]] == [
        "   step reward held-out entropy mismatch     kl length trunc  tok/s     s    ETA",
        " 11/124   0.25    0.750   1.234     3e-7 0.0012    3.2    1%  1,234   2.0  3m46s",
        " 12/124   0.41    0.750   1.234     3e-7 0.0012    3.2    1%  1,234   2.0  3m44s",
        "reward ▁█ 0.25 -> 0.41   held-out accuracy 0.478 -> 0.750 (step 11)",
        "rollout 0.9 train 1.0 sync 0.1",
    ]
    assert max(len(line.rstrip()) for line in last[1:6]) <= 80


def test_step_lines_and_notes_are_in_the_log_file_and_once_on_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    saved = (root.handlers[:], root.level)
    stream = io.StringIO()
    try:
        configure_logging(0, log_dir=tmp_path)
        progress = Progress(2, stream=stream)
        progress.step(1, {"reward/mean": 0.25})
        progress.note("a note")
    finally:
        logging.captureWarnings(False)
        root.handlers[:], root.level = saved
    text = (tmp_path / "rank_00000.log").read_text()
    assert all(part in text for part in ("step reward", " 1/2   0.25", "a note"))
    assert capsys.readouterr().err == ""
    assert stream.getvalue().count("a note") == 1


def test_a_print_of_a_reward_in_this_process_appears_above_the_display() -> None:
    stream = io.StringIO()
    with Progress(2, stream=stream, terminal=True):
        print("from a reward")
    before, found, after = stream.getvalue().partition("from a reward")
    assert found
    assert before.endswith("\x1b[2K")  # on a cleared line
    assert after.startswith("\n")
    assert "step 0/2" in after  # the display is drawn again below


def test_bars_span_the_lowest_to_the_highest_value() -> None:
    assert sparkline(deque([0.0, 0.5, 1.0])) == "▁▅█"
    assert sparkline(deque([2.0, 2.0, float("nan")])) == "▁▁ "
    assert sparkline(deque([float("nan")])) == ""


def test_the_terminal_is_restored_after_an_exception() -> None:
    stream, before = io.StringIO(), (sys.stdout, sys.stderr)

    def fail() -> None:
        assert sys.stderr is not before[1]
        raise RuntimeError("engine")

    with pytest.raises(RuntimeError, match="engine"), Progress(2, stream=stream, terminal=True):
        fail()
    assert (sys.stdout, sys.stderr) == before
    assert stream.getvalue().endswith("\x1b[?25h")  # the cursor is visible again


def test_log_messages_appear_above_the_live_display() -> None:
    stream = io.StringIO()
    root = logging.getLogger()
    saved = (root.handlers[:], root.level)
    try:
        configure_logging(0)
        with Progress(2, stream=stream, terminal=True):
            logging.getLogger("grpo_mega.test").info("a message")
        assert "[rank 0] a message" in stream.getvalue()
    finally:
        logging.captureWarnings(False)
        root.handlers[:], root.level = saved
