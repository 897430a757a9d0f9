"""The flight recorder in the report of a stall, with records of torch's own recorder and named pipes as NCCL makes."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from grpo_mega.launch import stall_agreement
from grpo_mega.launch.flight_records import (
    describe_dump,
    flight_environment,
    last_collectives,
    request_dumps,
)
from grpo_mega.launch.stall_agreement import StallAgreement
from grpo_mega.launch.stall_report import is_waiting
from grpo_mega.launch.stall_watch import RankStatus

RECORD = """
import sys, torch, torch.distributed as dist
from torch._C._distributed_c10d import _dump_fr_trace
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones(3))
dist.broadcast(torch.ones(2, 5), src=0)
sys.stdout.buffer.write(_dump_fr_trace(True, False, False))
"""


@pytest.fixture(scope="module")
def record() -> bytes:
    """Return the record of two collectives; gloo's have the form of NCCL's."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", RECORD], capture_output=True, check=True, timeout=120, env=env).stdout


def test_the_environment_of_the_user_is_kept_also_under_its_older_names(tmp_path: Path) -> None:
    found = flight_environment(tmp_path, os.environ)
    assert found["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert all(str(tmp_path) in found[key] for key in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_PIPE_FILE"))
    users = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "0", "TORCH_FR_DUMP_TEMP_FILE": "/x", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    assert list(flight_environment(tmp_path, users)) == ["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"]


def test_these_are_variables_of_the_installed_torch() -> None:
    """`torch` does not say that it does not know a variable, so a renamed one would do nothing."""
    import torch

    include = Path(torch.__file__).parent / "include" / "torch" / "csrc" / "distributed" / "c10d"
    known = "".join((include / name).read_text() for name in ("ProcessGroupNCCL.hpp", "FlightRecorder.hpp"))
    library = (Path(torch.__file__).parent / "lib" / "libtorch_cpu.so").read_bytes()
    for name in flight_environment(Path("/x"), {}):
        assert name in known or name.encode() in library, name
    assert 'c10::str(fileStem, rank, ".pipe")' in known


def test_the_last_collective_of_a_record_is_named(record: bytes) -> None:
    assert describe_dump(record) == (
        "last collective in the flight recorder: gloo:broadcast number 2 of process group 0 (default_pg), completed, "
        "input sizes [[2, 5]]"
    )


def test_the_first_collective_that_is_not_complete_is_named_too(record: bytes) -> None:
    dump = pickle.loads(record)
    for entry in dump["entries"]:
        entry |= {"retired": False, "state": "started" if entry["record_id"] == 0 else "scheduled"}
    text = describe_dump(pickle.dumps(dump, protocol=2))
    assert "gloo:broadcast number 2 of process group 0 (default_pg), scheduled, not completed" in text
    assert text.endswith("first one that is not complete: gloo:all_reduce number 1 of process group 0 (default_pg), "
                         "started, not completed, input sizes [[3]]")  # fmt: skip


@pytest.mark.parametrize("data", [b"", b"garbage", pickle.dumps([1]), pickle.dumps({"entries": [{}]})])
def test_a_record_that_cannot_be_read_gives_a_line_that_says_so(data: bytes) -> None:
    assert describe_dump(data).startswith("the record of the flight recorder cannot be read (")


def test_a_record_that_names_a_class_is_not_read(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    text = describe_dump(pickle.dumps({"entries": [Hostile()]}))
    assert "posix.system is not allowed" in text
    assert not (tmp_path / "executed").exists()


def test_a_pipe_is_written_and_the_file_that_appears_is_in_the_stacks_of_its_rank(
    record: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tmp_path / "nccl_pipe_rank_3.pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)

    def write_when_asked() -> None:  # the thread of NCCL
        while True:
            time.sleep(0.05)
            try:
                if os.read(reading, 128):
                    break
            except BlockingIOError:
                continue
        (tmp_path / "nccl_trace_rank_3").write_bytes(record)

    thread = threading.Thread(target=write_when_asked)
    thread.start()
    stack = 'Thread 1:\n  File "/x/torch/distributed/distributed_c10d.py", line 1 in barrier'
    monkeypatch.setattr(stall_agreement, "collect_stacks", lambda _, pids: dict.fromkeys(pids, stack))

    class Watch:
        def statuses(self) -> list[RankStatus]:
            return [RankStatus(n, "host", 100 + n, "train", 3, 10, 99.0, 60.0) for n in (3, 4)]

    found = StallAgreement(Watch(), tmp_path, None, is_first=True)._own_stacks()  # type: ignore[arg-type]
    thread.join(10)
    os.close(reading)
    assert found[3].endswith("number 2 of process group 0 (default_pg), completed, input sizes [[2, 5]]")
    assert is_waiting(found[3])  # the line is no frame
    assert found[4] == stack  # it has no pipe, as without NCCL


def test_without_nccl_nothing_is_asked_and_nothing_waited_for(tmp_path: Path) -> None:
    begin = time.monotonic()
    assert request_dumps(tmp_path, [0, 1]) == []
    assert last_collectives(tmp_path, [0, 1], [], begin) == {}
    os.mkfifo(tmp_path / "nccl_pipe_rank_0.pipe")  # of a rank that has exited: no process reads
    assert request_dumps(tmp_path, [0, 1]) == []
