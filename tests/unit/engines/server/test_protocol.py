"""Addresses, the shared secret and the keys that are derived from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import zmq

from grpo_mega.engines.server import protocol
from grpo_mega.engines.server.protocol import Address, curve_keys, read_token, require_token
from grpo_mega.types import UserError

SECRET = b"a secret of this test"


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("node3:7000", Address("node3", 7000)),
        ("127.0.0.1:65535", Address("127.0.0.1", 65535)),
        ("[::1]:70", Address("::1", 70)),
    ],
)
def test_addresses(url: str, found: Address) -> None:
    assert Address.parse(url, "engine.urls[0]") == found
    assert found.is_loopback == (found.host != "node3")


@pytest.mark.parametrize("url", ["", "node3", "node3:", ":7000", "node3:0", "node3:65536", "http://node3:7000", "a:-1"])
def test_other_texts_are_not_addresses(url: str) -> None:
    with pytest.raises(UserError) as caught:
        Address.parse(url, "engine.urls[1]")
    assert str(caught.value).startswith(f"engine.urls[1]={url} is not an address; write host:port")


@pytest.mark.parametrize("host", ["node..3", "n" * 64])
def test_a_host_that_cannot_be_a_name_is_rejected_before_it_is_looked_up(host: str) -> None:
    with pytest.raises(UserError, match=r"engine\.spare_urls\[0\]=.* has no valid host name"):
        Address.parse(f"{host}:7000", "engine.spare_urls[0]")


def test_the_secret_is_read_from_a_variable_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0123456789abcdef\n")
    assert read_token({}) == b""
    assert read_token({protocol.TOKEN_VARIABLE: "0123456789abcdef"}) == b"0123456789abcdef"
    assert read_token({protocol.TOKEN_FILE_VARIABLE: str(tmp_path / "token")}) == b"0123456789abcdef"
    with pytest.raises(UserError, match="has 5 characters; use at least 16"):
        read_token({protocol.TOKEN_VARIABLE: "short"})
    with pytest.raises(UserError, match=r"GRPO_MEGA_SERVER_TOKEN_FILE=.*nowhere cannot be read"):
        read_token({protocol.TOKEN_FILE_VARIABLE: str(tmp_path / "nowhere")})
    with pytest.raises(UserError, match="are both set"):
        read_token({protocol.TOKEN_VARIABLE: "0123456789abcdef", protocol.TOKEN_FILE_VARIABLE: str(tmp_path / "token")})


def test_only_loopback_addresses_are_served_without_a_secret() -> None:
    for host in ("localhost", "127.0.0.1", "::1"):
        require_token(host, b"", "engine.urls[0]")
    require_token("0.0.0.0", SECRET, "--host")
    with pytest.raises(UserError, match=r"--host is reachable from other machines.*; set GRPO_MEGA"):
        require_token("0.0.0.0", b"", "--host")


def test_keys_are_derived_from_the_secret_and_the_side() -> None:
    pairs = [curve_keys(token, side) for token in (b"", SECRET) for side in ("job", "server")]
    assert len({key for pair in pairs for key in pair}) == 8
    assert pairs[2] == curve_keys(SECRET, "job")
    for public_key, secret_key in pairs:
        assert zmq.curve_public(secret_key) == public_key
