"""Ranks of one machine that wait for each other at the start."""

from __future__ import annotations

import socket

import pytest

from grpo_mega.parallel.ports import free_port
from grpo_mega.parallel.ranks import _store_of_machine
from grpo_mega.types import UserError


def test_ranks_that_do_not_connect_are_named() -> None:
    with pytest.raises(RuntimeError, match=r"^rank 1, 2 of 3 did not connect within 1 s .*its process is stopped"):
        _store_of_machine("127.0.0.1", free_port(), 0, 3, 1.0)


def test_a_port_of_another_program_is_wrong_input() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"MASTER_PORT={port} is in use on this machine"):
            _store_of_machine("127.0.0.1", port, 0, 1, 1.0)


def test_all_ranks_connect() -> None:
    assert _store_of_machine("127.0.0.1", free_port(), 0, 1, 5.0).check(["connected/0"])
