"""A wish to stop: SIGUSR1, which Slurm sends some minutes before a job's time limit (launch/slurm.sbatch).

The signal is blocked from the start of every process and looked for at the end of each step. A blocked signal is
inherited by children and ends none of them, while the default action would end reward workers and engines half way.
Imports no torch at the top: the launcher passes the wish on without it. Tests: tests/e2e/test_resume.py.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grpo_mega.parallel.ranks import Ranks

STOP_SIGNAL = signal.SIGUSR1
EXIT_CODE = 130
"""Interrupted: neither done nor failed; the same command continues."""


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """The run left after a step, on a wish; its checkpoint is complete."""


def expect_stop() -> None:
    """From now on the signal waits until somebody looks; called before other threads and processes exist."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {STOP_SIGNAL})


def take_stop() -> bool:
    """Whether the signal has come since the last call."""
    if STOP_SIGNAL not in signal.sigpending():
        return False
    signal.sigwait({STOP_SIGNAL})
    return True


def stop_wanted(ranks: Ranks) -> bool:
    """Collective: has any rank been asked? The signal stays where it is, so every later call says the same."""
    wanted = STOP_SIGNAL in signal.sigpending()
    if ranks.topology.world_size == 1:
        return wanted
    import torch
    import torch.distributed as dist

    flag = torch.tensor(int(wanted))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())
