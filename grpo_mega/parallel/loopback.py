"""Listeners of process groups: on loopback if all ranks are on this machine, else on all interfaces.

torch's TCPStore and gloo do not authenticate, and by default both are reachable from other machines.
Asserted by tests/parallel/test_peer_group.py and tests/e2e/test_listeners.py.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore  # torch.distributed has the name, and its type hints do not

from grpo_mega.parallel.ports import is_loopback

_INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"


def keep_gloo_on_loopback() -> None:
    """Let all process groups of gloo in this process listen on loopback, unless the user named an interface.

    gloo has no other setting than its variable for the groups that torch creates.
    """
    os.environ.setdefault(_INTERFACE_VARIABLE, "lo")


def open_store(host: str, port: int, timeout_seconds: float) -> TCPStore:
    """Open a store in this process.

    Args:
        host: address of this machine. If it is loopback, other machines cannot connect; else all interfaces listen.
        port: 0 selects a free one.
        timeout_seconds: limit of each wait.

    Raises:
        OSError, DistNetworkError: the port is in use.
    """
    timeout = timedelta(seconds=timeout_seconds)
    if not is_loopback(host):
        return TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=timeout)
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    port = int(listener.getsockname()[1])
    descriptor = listener.detach()  # the store closes it
    return TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=descriptor)
