"""Which server a job claims: its own one, or a spare one in its place; with scripted answers and a clock of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from grpo_mega.engines.server import claim
from grpo_mega.engines.server.connection import ServerConnection
from grpo_mega.engines.server.protocol import NamedServer, named_servers
from grpo_mega.types import UserError

OWN, FIRST, SECOND = named_servers("engine.urls", ["own:1"]) + named_servers(
    "engine.spare_urls", ["first:1", "second:1"]
)
CONNECTION = cast("ServerConnection", object.__new__(ServerConnection))
LOST = claim._Unavailable("it does not answer (rejected)")
ENDING = claim._Unavailable("it serves another job (x)", is_ending=True)
BUSY = claim._Unavailable("it serves another job (x)", is_busy=True)
OTHER = claim._Unavailable("has another secret", error=UserError("has another secret", remedy="use the same"))


class Servers:
    """Servers whose answers depend on the time; an attempt takes `seconds_of[server]`, up to its limit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answers: dict[NamedServer, Callable[[float], Any]]) -> None:
        self.now, self.answers, self.attempts = 0.0, answers, list[tuple[str, float]]()
        self.seconds_of: dict[NamedServer, float] = {}
        monkeypatch.setattr(claim, "_try_to_claim", self.attempt)
        monkeypatch.setattr(claim.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(claim.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def attempt(self, server: NamedServer, _token: bytes, _facts: Any, limit: float) -> Any:
        self.attempts.append((server.key, self.now))
        answer = self.answers[server](self.now)
        self.now += min(limit, self.seconds_of.get(server, 0.0))
        return answer

    def claim(self, patience_seconds: float) -> claim.Claimed:
        return claim.claim_server([*self.answers], b"", cast("Any", None), patience_seconds)[0]

    def first(self, server: NamedServer) -> float:
        """Return the time of the first attempt."""
        return next(time for key, time in self.attempts if key == server.key)


def test_a_lost_server_is_replaced_after_ten_seconds_by_the_first_spare_that_is_available(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    servers = Servers(monkeypatch, {OWN: lambda _: LOST, FIRST: lambda _: BUSY, SECOND: lambda _: CONNECTION})
    assert servers.claim(48.0) == claim.Claimed(SECOND, "it does not answer (rejected)")
    assert servers.first(FIRST) == servers.first(SECOND) == 10.0


def test_the_own_server_is_claimed_if_it_is_started_again_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    servers = Servers(monkeypatch, {OWN: lambda now: CONNECTION if now > 6 else LOST, FIRST: lambda _: CONNECTION})
    assert servers.claim(48.0) == claim.Claimed(OWN, "")


def test_a_server_that_still_works_for_the_last_job_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take the only spare server away from a group whose server is lost."""
    servers = Servers(monkeypatch, {OWN: lambda now: CONNECTION if now > 30 else ENDING, FIRST: lambda _: CONNECTION})
    assert servers.claim(48.0) == claim.Claimed(OWN, "")
    assert {key for key, _ in servers.attempts} == {"engine.urls[0]"}
    then_lost = Servers(monkeypatch, {OWN: lambda now: LOST if now > 20 else ENDING, FIRST: lambda _: CONNECTION})
    assert then_lost.claim(48.0).server == FIRST
    assert 30 <= then_lost.first(FIRST) <= 31


@pytest.mark.parametrize("patience", [1.0, 8.0, 16.0, 48.0])
def test_servers_that_do_not_respond_take_no_more_than_the_whole_wait(
    monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    servers = Servers(monkeypatch, {OWN: lambda _: LOST, FIRST: lambda _: LOST, SECOND: lambda _: LOST})
    servers.seconds_of = dict.fromkeys(servers.answers, 600.0)
    with pytest.raises(UserError, match=r"engine\.urls\[0\]=own:1: no engine server .*second:1: it does not answer"):
        servers.claim(patience)
    assert patience <= servers.now < patience + 1.5


def test_a_spare_is_reached_before_a_server_that_does_not_respond_is_tried_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for patience, seconds in ((48.0, 10.5), (8.0, 4.5)):
        servers = Servers(monkeypatch, {OWN: lambda _: LOST, FIRST: lambda _: CONNECTION})
        servers.seconds_of = {OWN: 600.0}
        assert servers.claim(patience).server == FIRST
        assert servers.first(FIRST) == seconds


def test_a_server_with_other_settings_is_an_error_at_the_second_attempt_or_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that is killed while a client connects looks like one with another secret, once."""
    alone = Servers(monkeypatch, {OWN: lambda _: OTHER})
    with pytest.raises(UserError, match="has another secret"):
        alone.claim(48.0)
    assert alone.now < 2
    killed = Servers(monkeypatch, {OWN: lambda now: OTHER if now == 0 else CONNECTION if now > 5 else LOST})
    assert killed.claim(48.0) == claim.Claimed(OWN, "")
    with_spare = Servers(
        monkeypatch,
        {OWN: lambda now: OTHER if now == 0 else CONNECTION if now > 5 else LOST, FIRST: lambda _: CONNECTION},
    )
    assert with_spare.claim(48.0) == claim.Claimed(OWN, "")
    replaced = Servers(monkeypatch, {OWN: lambda _: OTHER, FIRST: lambda _: CONNECTION})
    assert replaced.claim(48.0) == claim.Claimed(FIRST, "has another secret")
    assert replaced.now < 2
    both = Servers(monkeypatch, {OWN: lambda _: OTHER, FIRST: lambda _: OTHER})
    with pytest.raises(UserError, match=r"own:1: no engine server .*has another secret; .*first:1: has another secret"):
        both.claim(48.0)
    assert both.now < 2


def test_a_server_of_another_job_is_waited_for_only_as_long_as_it_may_take_to_notice_that_a_job_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    servers = Servers(monkeypatch, {OWN: lambda _: BUSY})
    with pytest.raises(UserError, match="it serves another job"):
        servers.claim(48.0)
    assert 5 <= servers.now <= 6
    both = Servers(monkeypatch, {OWN: lambda _: BUSY, FIRST: lambda _: BUSY})
    with pytest.raises(UserError, match=r"it serves another job .*first:1: it serves another job"):
        both.claim(48.0)
    assert 10 <= both.now <= 11
