"""Lines that a worker prints, in the log of its parent."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_mega.observe.log import configure_logging
from grpo_mega.workers.worker_output import MAX_LINE_BYTES, MAX_SHOWN, log_output


def output_of(program: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    thread = log_output(process.stdout, "rewards worker 7")
    process.wait(30)
    thread.join(30)
    assert not thread.is_alive()


def test_each_line_is_a_message_with_the_name_of_the_worker(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    output_of("import sys; print('one'); sys.stdout.flush(); sys.stderr.write('two'); sys.stderr.flush()")
    assert caplog.messages == ["rewards worker 7: one", "rewards worker 7: two"]


def test_broken_utf_8_and_long_lines_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    output_of("import os; os.write(1, b'Zo\\xe9\\n'); os.write(1, b'x' * 25_000 + b'\\n')")
    assert caplog.messages[0] == "rewards worker 7: Zo\\xe9"
    lengths = [len(message.removeprefix("rewards worker 7: ")) for message in caplog.messages[1:]]
    assert lengths == [MAX_LINE_BYTES, MAX_LINE_BYTES, 25_000 - 2 * MAX_LINE_BYTES]


def test_the_screen_shows_the_first_lines_and_no_escape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    saved = (root.handlers[:], root.level)
    try:
        configure_logging(0, log_dir=tmp_path)
        output_of(r"print('\x1b[2J first'); [print('more') for _ in range(50)]")
    finally:
        logging.captureWarnings(False)
        root.handlers[:], root.level = saved
    shown = capsys.readouterr().err
    assert r"rewards worker 7: \x1b[2J first" in shown
    assert "\x1b" not in shown
    assert shown.count("more\n") == MAX_SHOWN - 1
    assert shown.endswith("more lines are in the log file only\n")
    assert (tmp_path / "rank_00000.log").read_text().count(": more\n") == 50


def test_in_a_program_without_a_log_the_lines_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.WARNING)
    try:
        output_of("print('debug of a reward')")
    finally:
        root.setLevel(level)
    assert capsys.readouterr().err == "debug of a reward\n"
