"""TCP addresses and ports of this machine. Imports no torch: the launcher starts without it.

Asserted by tests/unit/parallel/test_ports.py.
"""

from __future__ import annotations

import random
import socket
from pathlib import Path

_OUTGOING_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 20_000  # ports below are often those of services
_TRIES = 50


def is_loopback(host: str) -> bool:
    """Return True if `host` names this machine and other machines cannot connect to it."""
    return host in ("localhost", "::1") or host.startswith("127.")


def port_is_free(port: int) -> bool:
    """Return True if a server can listen on the port. Uses SO_REUSEADDR, as the rendezvous store does."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError:
            return False
    return True


def free_port() -> int:
    """Return a port that is free now, below the ports of outgoing connections if there is one.

    A server may listen on the port a minute later. In between, the system gives a port of the outgoing range to any
    program that connects somewhere or asks for any port.
    """
    chance = random.SystemRandom()  # independent of the seeds of a run
    end = int(_OUTGOING_RANGE.read_text().split()[0]) if _OUTGOING_RANGE.exists() else _LOWEST
    for _ in range(_TRIES if end > _LOWEST else 0):
        port = chance.randrange(_LOWEST, end)
        if port_is_free(port):
            return port
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
