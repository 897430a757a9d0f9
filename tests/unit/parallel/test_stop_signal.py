"""grpo_mega.parallel.stop_signal: SIGUSR1 stays pending; SIGINT and SIGTERM are requests once, and only in training."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CODE = """
import os, signal
from grpo_mega.parallel.stop_signal import StopRequests, largest_on_all, take_stop
stops = StopRequests()
import torch  # which starts threads
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.parallel.topology import Topology
topology = Topology(1)
ranks = Ranks(topology, topology.coordinates(0), torch.device("cpu"))
assert not stops.wanted()
assert not take_stop()
os.kill(os.getpid(), signal.SIGUSR1)
assert stops.wanted() == 130
assert stops.wanted() == 130
assert largest_on_all((130, 0), ranks) == (130, 0)
assert take_stop()
assert not take_stop()
assert not stops.wanted()
"""

# Waits in a library call that returns to Python only after a minute: a read of an empty pipe that is repeated in C.
RANK = """
import ctypes, os, sys, time
from grpo_mega.parallel.stop_signal import Interrupted, StopRequests
stops = StopRequests()
if "train" in sys.argv:
    stops.training_starts()
child = os.fork() if "child" in sys.argv else None
if child == 0:
    os.execlp("sleep", "sleep", "60")
if child is not None:
    print(child, flush=True)
try:
    print("ready", flush=True)
    if "busy" in sys.argv:
        libc = ctypes.CDLL(None)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            libc.usleep(20_000_000)
    while not stops.wanted():
        time.sleep(0.01)
except Interrupted as interrupted:
    sys.exit(interrupted.code)
print("wanted", stops.wanted(), flush=True)
time.sleep(60)
"""


def start(*mode: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", RANK, *mode], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while process.stdout.readline() != "ready\n":
        assert process.poll() is None
    return process


def test_every_check_sees_the_signal_until_it_is_consumed() -> None:
    ended = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_before_training_a_signal_ends_the_process_without_a_traceback(number: signal.Signals, code: int) -> None:
    process = start()
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (code, "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_in_training_the_first_signal_is_a_request_and_the_second_ends_the_process(
    number: signal.Signals, code: int
) -> None:
    process = start("train")
    process.send_signal(number)
    assert process.stdout is not None
    assert process.stdout.readline() == f"wanted {code}\n"
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(20) == code


def test_the_second_signal_ends_a_process_that_waits_in_a_library() -> None:
    """Python's own handler would run only when the library returns."""
    process = start("train", "busy")
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert time.monotonic() - begin < 10


def test_children_keep_the_default_action_of_sigterm() -> None:
    process = subprocess.Popen([sys.executable, "-c", RANK, "train", "child"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    status = Path(f"/proc/{child}/status")
    deadline = time.monotonic() + 10
    while "sleep" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    fields = [line.split() for line in status.read_text().splitlines()]
    masks = {words[0]: int(words[1], 16) for words in fields if words[0] in ("SigBlk:", "SigIgn:", "SigCgt:")}
    handled = 1 << (signal.SIGTERM - 1)
    assert not (masks["SigBlk:"] | masks["SigIgn:"] | masks["SigCgt:"]) & handled
    assert masks["SigBlk:"] & (1 << (signal.SIGUSR1 - 1))
    for each in (child, process.pid):
        subprocess.run(["kill", "-9", str(each)], check=True)
    process.wait(20)
