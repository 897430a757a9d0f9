"""All ranks connect the group of a transport together before its first message, also a rank that has no message."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grpo_mega.parallel.peer_group import PeerGroup
from grpo_mega.weight_sync.transports import factory
from grpo_mega.weight_sync.transports.base import BucketMessage, Round


class RecordedWorld:
    """Stub of the group of two ranks; the other one sends over `kinds`. Records what this rank does."""

    group = "group"

    def __init__(self, kinds: set[str]) -> None:
        self._kinds = kinds
        self.calls: list[str] = []

    def gather(self, value: Any) -> list[Any]:
        return [value, self._kinds]

    def connect(self, device: torch.device) -> None:
        self.calls.append(f"connect {device.type}")


SENDS = [Round(0, [BucketMessage(1, 0, 64)], [])]
IDLE = [Round(0, [], [])]


@pytest.mark.parametrize(
    ("rounds", "others", "calls"),
    [
        ({"gloo": SENDS}, set(), ["connect cpu", "transport"]),
        ({"gloo": IDLE}, {"gloo"}, ["connect cpu", "transport"]),  # no message in any round, and still connected
        ({}, {"gloo"}, ["connect cpu"]),
        ({"gloo": IDLE}, set(), []),
    ],
)
def test_the_group_is_connected_before_a_transport_uses_it(
    rounds: dict[str, list[Round]], others: set[str], calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = RecordedWorld(others)

    def made(*_: object) -> None:
        world.calls.append("transport")

    monkeypatch.setattr(factory, "GroupTransport", made)
    factory.make_transports(rounds, 1.0, world)  # type: ignore[arg-type]
    assert world.calls == calls


def test_connecting_is_one_collective_of_all_ranks() -> None:
    calls: list[str] = []

    class Group:
        def allreduce(self, tensors: list[torch.Tensor]) -> Group:
            calls.append(f"sum of {len(tensors)} on {tensors[0].device.type}")
            return self

        def wait(self) -> None:
            calls.append("wait")

    peers: Any = object.__new__(PeerGroup)
    object.__setattr__(peers, "group", Group())
    peers.connect(torch.device("cpu"))
    assert calls == ["sum of 1 on cpu", "wait"]
