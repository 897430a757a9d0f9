"""Stop requests: SIGUSR1, which Slurm sends a few minutes before a job's time limit (launch/slurm.sbatch).

Every process blocks the signal from its start, and the training loop checks for it at the end of each step. Children
inherit the blocked signal, so it does not end reward workers and engines as its default action would. Imports no torch
at the top, because the launcher forwards stop requests without it. Tests: tests/e2e/test_resume.py.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grpo_mega.parallel.ranks import Ranks

STOP_SIGNAL = signal.SIGUSR1
EXIT_CODE = 130
"""Exit code of an interrupted run, which the same command continues."""


class Stopped(Exception):  # noqa: N818 - it is not an error
    """The run stopped after a step because of a stop request; its checkpoint is complete."""


def expect_stop() -> None:
    """Block the signal until it is checked. Call before other threads and processes are started."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {STOP_SIGNAL})


def take_stop() -> bool:
    """Return True if the signal arrived since the last call."""
    if STOP_SIGNAL not in signal.sigpending():
        return False
    signal.sigwait({STOP_SIGNAL})
    return True


def stop_wanted(ranks: Ranks) -> bool:
    """Return True on all ranks if any rank received the signal, which stays pending. Collective."""
    wanted = STOP_SIGNAL in signal.sigpending()
    if ranks.topology.world_size == 1:
        return wanted
    import torch
    import torch.distributed as dist

    flag = torch.tensor(int(wanted))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())
