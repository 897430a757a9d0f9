"""A mistake on every rank is reported once, and one on a single rank is reported too."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from grpo_mega.launch.supervisor import run_ranks
from grpo_mega.parallel.error_report import report_error
from grpo_mega.types import UserError

WORKER = """
import os, sys, time
from grpo_mega.parallel.error_report import report_error
from grpo_mega.types import UserError
rank = int(os.environ["RANK"])
if rank not in FAILING:
    time.sleep(60)
time.sleep(0.3 if rank == 0 else 0)
report_error(UserError(f"data.train=x on rank {rank}", remedy="name another"))
sys.exit(2)
"""


def test_the_message_has_the_form_of_every_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    report_error(UserError("a.b=3 is odd", remedy="use 4"))
    assert capsys.readouterr().err == "error: a.b=3 is odd; use 4\n"


@pytest.mark.parametrize(("failing", "named"), [((0, 1, 2), 0), ((2,), 2)])
def test_the_last_line_on_the_screen_is_the_reason(
    failing: tuple[int, ...], named: int, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    environments = [{**os.environ, "RANK": str(rank)} for rank in range(3)]
    assert run_ranks([sys.executable, "-c", WORKER.replace("FAILING", str(failing))], environments) == 2
    assert capfdbinary.readouterr().err == f"error: data.train=x on rank {named}; name another\n".encode()


def test_without_a_launcher_the_first_rank_does_not_wait() -> None:
    command = "from grpo_mega.parallel import error_report as e; e.time.sleep = None; e.report_error(e.UserError('x'))"
    done = subprocess.run(
        [sys.executable, "-c", command], env={**os.environ, "RANK": "0"}, capture_output=True, check=True
    )
    assert done.stderr == b"error: x\n"
