"""`grpo-mega watch`: one view, following without a terminal, and exit codes."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from grpo_mega.cli.watch import main
from tests.helpers.reported_runs import HOSTILE, metrics_line, write_run


def test_once_prints_one_view(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_run(tmp_path / "run")), "--once"]) == 0
    out = capsys.readouterr().out
    assert "step 6/6  done" in out
    assert "verdict: learned" in out


def test_a_folder_that_does_not_exist_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "missing")]) == 2
    assert capsys.readouterr().err.startswith("error: RUN_DIR=")


def test_a_wrong_interval_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--interval", "0"]) == 2
    assert "--interval=0 must be above 0" in capsys.readouterr().err


def test_it_follows_a_run_until_it_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", steps=6)
    (folder / "summary.json").write_text(json.dumps({"status": "interrupted"}))

    def run() -> None:
        time.sleep(0.3)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics_line(7)) + "\n")
        time.sleep(0.3)
        (folder / "summary.json").write_text(json.dumps({"status": "done"}))

    writer = threading.Thread(target=run)
    writer.start()
    assert main([str(folder), "--interval", "0.05"]) == 0
    writer.join()
    out = capsys.readouterr().out
    assert out.index("step 6/6") < out.index("step 7/6") < out.rindex("step 7/6  done")


def test_on_a_terminal_a_hostile_completion_sends_no_escape_of_its_own(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", text=HOSTILE)
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "grpo_mega.cli.main", "watch", str(folder)]
    process = subprocess.Popen(command, stdout=follower, env=os.environ | {"TERM": "xterm", "COLUMNS": "300"})
    os.close(follower)
    shown = b""
    try:
        while part := os.read(leader, 65536):
            shown += part
    except OSError:  # the end of a terminal
        pass
    os.close(leader)
    assert process.wait(60) == 0
    assert rb"\x1b[2J" in shown
    assert b"\x1b[2J" not in shown
    assert b"\x1b]0;" not in shown


def test_a_reader_may_close_the_pipe(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    command = f"{sys.executable} -m grpo_mega.cli.main watch {run} | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
