"""Stub of grpo_mega/train.py in a copied checkout (tests/helpers/stub_checkout.py).

A stub rank connects to the other ranks at MASTER_ADDR and MASTER_PORT, records its environment, and exits. The programs
that start it are real. STUB_EXIT="3:2": rank 3 prints an error and exits with 2; the others wait for their
termination. STUB_WAIT=FILE: all wait for a stop request and exit with 130. If FILE exists, from an earlier start, they
do not wait.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import sys
import time
from pathlib import Path

from grpo_mega.parallel.stop_signal import EXIT_CODE, expect_stop, take_stop

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_NODEID", "SLURM_RESTART_COUNT")


def wait_for_ranks(rank: int, world_size: int) -> None:
    """Wait until every rank has connected to rank 0."""
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if rank == 0:
        with socket.create_server(("", address[1])) as server:
            connections = [server.accept()[0] for _ in range(world_size - 1)]
            for connection in connections:
                connection.sendall(b"all connected")
        return
    deadline = time.monotonic() + 60
    while True:
        try:
            with socket.create_connection(address, timeout=60) as connection:
                if connection.recv(100) == b"all connected":
                    return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def main() -> None:
    if "--for-launcher" in sys.argv:
        runpy.run_path(str(Path(__file__).with_name("real_train.py")), run_name="__main__")
        return
    expect_stop()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    wait_for_ranks(rank, world_size)
    named = [word.partition("=")[2] for word in sys.argv if word.startswith("run.dir=")]
    folder = Path(named[0] if named else f"runs/{Path(sys.argv[1]).stem}")
    folder.mkdir(parents=True, exist_ok=True)
    account = {name: int(os.environ[name]) for name in NAMES if name in os.environ}
    (folder / f"rank_{rank}.json").write_text(json.dumps(account))
    if (failing := os.environ.get("STUB_EXIT")) is not None:
        failing_rank, code = map(int, failing.split(":"))
        if rank == failing_rank:
            sys.stderr.write(f"error: rank {rank} fails\n")
            sys.exit(code)
        time.sleep(60)
    if (mark := os.environ.get("STUB_WAIT")) is not None and not Path(mark).exists():
        while not take_stop():
            time.sleep(0.05)
        Path(mark).touch()
        sys.exit(EXIT_CODE)


if __name__ == "__main__":
    main()
