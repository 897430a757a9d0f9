"""Two commands never share a run folder, and a killed one leaves it free."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_mega.observe.run_lock import run_lock
from grpo_mega.types import UserError

HOLD = """
import sys, os
from pathlib import Path
from grpo_mega.observe.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    child = os.fork()
    if child == 0:
        os.close(1)
        sys.stdin.read()
        os._exit(0)
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


def test_a_second_command_is_rejected_until_the_first_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        pid = int(holder.stdout.readline())
        with pytest.raises(UserError, match=rf"run.dir=.*one is in use by process {pid} on .*; wait for it"):
            run_lock(folder).__enter__()
        with run_lock(tmp_path / "runs" / "other"):
            pass
        holder.kill()  # its forked child lives on, and holds nothing
        holder.wait(10)
        with run_lock(folder):
            lines = (tmp_path / "runs" / ".one.lock").read_text().splitlines()
            assert lines == [f"process {os.getpid()} on {os.uname().nodename}"]
        assert not folder.exists()


def test_a_folder_that_cannot_be_created_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run.dir=.* cannot be written"):
        run_lock(tmp_path / "file" / "run").__enter__()
