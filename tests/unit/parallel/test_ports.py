"""Free ports."""

from __future__ import annotations

import socket
from contextlib import closing
from pathlib import Path
from unittest import mock

import pytest

from grpo_mega.parallel import ports


def test_a_port_with_a_listener_is_not_free() -> None:
    with closing(socket.create_server(("", 0))) as server:
        assert not ports.port_is_free(server.getsockname()[1])


@pytest.mark.parametrize(("outgoing", "low", "high"), [("25000\t60999", 20_000, 25_000), ("1024\t60999", 1024, 65536)])
def test_a_free_port_is_below_the_ports_of_outgoing_connections_if_there_is_room(
    tmp_path: Path, outgoing: str, low: int, high: int
) -> None:
    (tmp_path / "range").write_text(outgoing)
    with mock.patch.object(ports, "_OUTGOING_RANGE", tmp_path / "range"):
        found = [ports.free_port() for _ in range(5)]
    assert all(low <= port < high for port in found)


def test_a_port_that_is_taken_is_not_returned(tmp_path: Path) -> None:
    (tmp_path / "range").write_text(f"{ports._LOWEST + 2} 60999")
    free = ports._LOWEST + 1
    with (
        mock.patch.object(ports, "_OUTGOING_RANGE", tmp_path / "range"),
        mock.patch.object(ports, "port_is_free", side_effect=lambda port: port == free),
    ):
        assert {ports.free_port() for _ in range(5)} == {free}
