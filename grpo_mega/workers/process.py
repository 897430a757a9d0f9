"""Worker processes of a rank: new programs that inherit nothing of what makes it a rank, and that end with it."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys

_DROPPED_PREFIXES = ("CUDA_", "GLOO_", "LOCAL_", "MASTER_", "NCCL_", "PMI", "ROLE_", "SLURM_", "TORCH", "VLLM_")
_DROPPED = frozenset(("RANK", "WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "LD_PRELOAD", "OMPI_COMM_WORLD_RANK"))
_PR_SET_PDEATHSIG = 1


def clean_environment() -> dict[str, str]:
    """The environment of this process without ranks, launchers and devices; the import path is handed on as it is."""
    kept = {k: v for k, v in os.environ.items() if k not in _DROPPED and not k.startswith(_DROPPED_PREFIXES)}
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return kept | {"PYTHONPATH": path, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start_worker(module: str, connection: socket.socket) -> subprocess.Popen[bytes]:
    """`python -m module`, told the descriptor of its end of the connection and its parent's number.

    It leads a session of its own, and what it prints goes to stderr: stdout is for what the parent writes.
    """
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, str(connection.fileno()), str(os.getpid())],
        pass_fds=(connection.fileno(),),
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        stdout=2,
        start_new_session=True,
    )


def die_with(parent: int) -> None:
    """Called in a worker: the kernel ends it when its parent is gone, however that ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)
