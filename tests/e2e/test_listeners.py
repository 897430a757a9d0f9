"""No process of a job on one machine can be reached from other machines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.helpers.jobs import SMALL, running_job


def listening(process: psutil.Popen) -> Iterator[tuple[str, str]]:
    """Yield (program, address) of all listening sockets of a process and its children."""
    with suppress(psutil.Error):
        for member in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error):
                for each in member.net_connections("inet"):
                    if each.status == psutil.CONN_LISTEN:
                        yield " ".join(member.cmdline()[-2:])[:80], each.laddr.ip


@pytest.mark.parametrize("keys", [("run.world_size=2",)], ids=["DP2 vLLM"])
def test_all_listeners_of_a_job_on_one_machine_are_on_loopback(tmp_path: Path, keys: tuple[str, ...]) -> None:
    found: set[tuple[str, str]] = set()
    deadline = time.monotonic() + 240
    with running_job((*SMALL, *keys, "train.steps=1", f"run.dir={tmp_path / 'run'}"), tmp_path / "log") as job:
        while job.poll() is None and time.monotonic() < deadline:
            found |= set(listening(job))
            time.sleep(0.1)
        assert job.poll() == 0, (tmp_path / "log.err").read_text()[-2000:]
    assert len(found) >= 1  # the store and gloo of the ranks
    assert {address for _, address in found} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, found
