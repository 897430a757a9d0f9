"""The command of an engine server: input that it rejects before it imports torch."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from grpo_mega.serve import _bind
from grpo_mega.types import UserError
from tests.helpers.jobs import QUICKSTART, REPOSITORY, clean_environment


def run_serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    own = {key: value for key, value in clean_environment().items() if not key.startswith("GRPO_MEGA_SERVER")}
    return subprocess.run(
        [sys.executable, "-m", "grpo_mega.serve", *arguments],
        cwd=REPOSITORY,
        env=own | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((QUICKSTART, "--host", "0.0.0.0"), "--host=0.0.0.0 is reachable from other machines, and no secret is set; "),
        ((QUICKSTART, "engine.kind=sglang"), "engine.placement=server is not supported with engine.kind=sglang; "),
        ((QUICKSTART, "engine.tq=2"), "engine.tq: unknown key"),
    ],
)
def test_wrong_input_is_one_message(arguments: tuple[str, ...], message: str) -> None:
    result = run_serve(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {message}")
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run_serve(QUICKSTART, "--port", port)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: --host=127.0.0.1 --port={port}: cannot listen")
    assert "Address already in use" in result.stderr


@pytest.mark.parametrize("port", [-1, 65536])
def test_an_impossible_port_is_an_error_of_the_user(port: int) -> None:
    with pytest.raises(UserError, match=f"--port={port}: cannot listen at this address"):
        _bind("127.0.0.1", port)
