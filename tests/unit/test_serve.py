"""The command of an engine server: what is refused before anything heavy is imported."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from tests.helpers.jobs import QUICKSTART, REPOSITORY, clean_environment


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
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
    ("arguments", "told"),
    [
        ((QUICKSTART, "--host", "0.0.0.0"), "--host=0.0.0.0 is reached from other machines and there is no secret; "),
        ((QUICKSTART, "engine.kind=sglang"), "engine.placement=server with engine.kind=sglang, which runs beside "),
        ((QUICKSTART, "engine.tq=2"), "engine.tq: unknown key"),
    ],
)
def test_wrong_input_is_one_message(arguments: tuple[str, ...], told: str) -> None:
    ended = serve(*arguments)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {told}")
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stdout == ""


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = serve(QUICKSTART, "--port", port)
    assert ended.returncode == 2
    assert ended.stderr == (
        f"error: --host=127.0.0.1 --port={port}: cannot listen there (Address already in use); choose another\n"
    )
