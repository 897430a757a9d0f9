"""TCP ports of this machine. Imports no torch: the launcher starts without it."""

from __future__ import annotations

import socket


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
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
