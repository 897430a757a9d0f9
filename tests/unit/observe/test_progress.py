"""The display of a run, live and plain."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from grpo_mega.observe.log import configure_logging
from grpo_mega.observe.progress import Progress

STEP = {
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


def test_a_step_is_one_plain_line_when_piped() -> None:
    stream = io.StringIO()
    with Progress(total_steps=112, first_step=12, stream=stream) as progress:
        progress.phase("rollout")
        progress.step(12, STEP)
        progress.note("checkpoint [12] saved")
    assert stream.getvalue().splitlines() == [
        "step 12/112  reward 0.41  accuracy 0.40  length 3.2  kl 0.0012  mismatch 3e-7  1,234 tok/s  "
        "2.0 s (rollout 0.9 train 1.0 sync 0.1)  ETA 3m 20s",
        "checkpoint [12] saved",
    ]


def test_missing_metrics_are_not_shown() -> None:
    stream = io.StringIO()
    Progress(total_steps=3, stream=stream).step(1, {"reward/mean": float("nan")})
    assert stream.getvalue() == "step 1/3  reward nan\n"


def test_the_eta_follows_the_last_twenty_steps() -> None:
    stream = io.StringIO()
    progress = Progress(total_steps=121, stream=stream)
    progress.step(1, {"time/step_seconds": 1000.0})
    for step in range(2, 22):
        progress.step(step, {"time/step_seconds": 3.0})
    assert stream.getvalue().splitlines()[-1].endswith("ETA 5m 00s")


def test_a_terminal_shows_bar_numbers_and_the_current_phase() -> None:
    stream = io.StringIO()
    with Progress(total_steps=24, stream=stream, terminal=True) as progress:
        progress.step(12, STEP)
        progress.phase("evaluation")
        progress.note("[bold] is text")
    shown = stream.getvalue()
    for part in ("step 12/24", "━", "reward 0.41", "1,234 tok/s", "evaluation 0 s", "ETA 24.0s", "[bold] is text"):
        assert part in shown, part
    assert "\x1b[" in shown


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
