"""grpo_mega.parallel.stop_signal: the signal stays pending, and every check returns the same result."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import os, signal
from grpo_mega.parallel.stop_signal import expect_stop, stop_wanted, take_stop
expect_stop()
import torch  # which starts threads
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.parallel.topology import Topology
topology = Topology(1)
ranks = Ranks(topology, topology.coordinates(0), torch.device("cpu"))
assert not stop_wanted(ranks)
assert not take_stop()
os.kill(os.getpid(), signal.SIGUSR1)
assert stop_wanted(ranks)
assert stop_wanted(ranks)
assert take_stop()
assert not take_stop()
"""


def test_every_check_sees_the_signal_until_it_is_consumed() -> None:
    ended = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
