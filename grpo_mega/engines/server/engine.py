"""Engines on other devices: each group of ranks is served by an engine that a server of its own runs (serve.py).

The ranks of the job are cut into as many contiguous groups as there are servers. The first rank of a group speaks to
its server; the others hear from it what came back, in parts, so that no rank waits longer than a beat for another. The
weights go from every rank that holds them to every rank of the servers that lacks them, in a process group of both.
Asserted by tests/parallel/test_servers.py, tests/engine/test_engine_contract.py and tests/e2e/test_server.py.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from grpo_mega.engines.replica_broadcast import ReplicaBroadcast
from grpo_mega.engines.request_checks import check_lengths, in_groups, require_ready
from grpo_mega.engines.server.client import ServerClient
from grpo_mega.engines.server.messages import read_rollout, sample_command
from grpo_mega.engines.server.protocol import Address, ServerMessage, read_token
from grpo_mega.interfaces import SinkRegion, SyncPeers, WeightSink
from grpo_mega.parallel.peer_group import PeerGroup, find_store, join_world, open_store
from grpo_mega.types import Completion, Prompt, SamplingRequest, TensorSlice, UserError

_CONNECT_SHARE = 0.8  # of the limit of a wait: the ranks that wait meanwhile have the whole of it


class ServerEngine:
    """`Engine` at `urls`. Sync before the first `generate`.

    Args:
        urls: of the servers, in the order of the groups of ranks that they serve.
        tp: ranks of each server.
        facts: what a server must have in common with this job (server/serving.py).
        max_model_len: longest prompt plus completion, tokens.
        tell_experts: the servers can answer requests with `expert_choices`.
        timeout_seconds: of every wait.

    Raises:
        UserError: on all ranks; a server does not come, serves another job, or has something otherwise.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        tp: int,
        facts: dict[str, Any],
        max_model_len: int,
        tell_experts: bool,
        timeout_seconds: float,
    ) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        if world % len(urls):
            raise UserError(f"engine.urls names {len(urls)} servers, which do not divide the {world} ranks of the job")
        self._names = [f"engine.urls[{i}]={url}" for i, url in enumerate(urls)]
        self._addresses = [Address.parse(url, f"engine.urls[{i}]") for i, url in enumerate(urls)]
        self._tp, self._max_model_len, self._tell_experts = tp, max_model_len, tell_experts
        self._timeout = timeout_seconds
        self._ranks = ReplicaBroadcast(world // len(urls), timeout_seconds)
        self._link: ServerClient | None = None
        served_by = rank // (world // len(urls))
        fault = self._connect(served_by, facts) if self._ranks.is_first else None
        faults: list[str | None] = [None] * world
        dist.all_gather_object(faults, fault)
        if any(faults):
            self.close()
            raise UserError("\n".join(fault for fault in faults if fault))
        self._sink = ServedSink()
        self._asleep: set[str] = set()

    @property
    def policy_version(self) -> int:
        """Updates behind the weights; -1 before the first sync."""
        return self._sink.policy_version

    @property
    def sink(self) -> WeightSink:
        """Empty: the weights go to the ranks of the servers."""
        return self._sink

    @property
    def replicas(self) -> list[list[int]]:
        """Ranks of each server in the world of `meet`: behind those of the job."""
        first = dist.get_world_size()
        return [list(range(first + i * self._tp, first + (i + 1) * self._tp)) for i in range(len(self._names))]

    def meet(self, shapes: dict[str, tuple[int, ...]], where: str, *, bucket_bytes: int, transport: str) -> PeerGroup:
        """Collective: the ranks of the job and of all servers, which make their end of the weight sync meanwhile.

        Args:
            shapes: of every tensor that the policy holds.
            where: this rank's coordinates, for messages.
            bucket_bytes: of the sync.
            transport: of the sync.

        Raises:
            RuntimeError: a server does not come.
        """
        size = dist.get_world_size()
        names: list[str] = [""] * size
        dist.all_gather_object(names, where)
        names += [f"engine server {name}, rank {t} of {self._tp}" for name in self._names for t in range(self._tp)]
        store = open_store(self._timeout) if dist.get_rank() == 0 else None
        told = [None if store is None else (store.port, [_address_towards(each) for each in self._addresses])]
        dist.broadcast_object_list(told, src=0)
        assert told[0] is not None, "rank 0 has told"
        port, addresses = told[0]
        if store is None:
            store = find_store(os.environ.get("MASTER_ADDR", "127.0.0.1"), port, self._timeout)
        if self._link is not None:
            number = self._names.index(self._link.name)
            self._link.start(
                "meet",
                {
                    "address": addresses[number],
                    "port": port,
                    "names": names,
                    "first_rank": self.replicas[number][0],
                    "replicas": self.replicas,
                    "shapes": shapes,
                    "bucket_bytes": bucket_bytes,
                    "transport": transport,
                    "timeout_seconds": self._timeout,
                },
            )
        return join_world(store, dist.get_rank(), names, self._timeout, self._check)

    def announce(self, policy_version: int, verify: bool) -> None:
        """Has the servers take part in a push."""
        if self._link is not None:
            self._link.start("push", {"policy_version": policy_version, "verify": verify})

    def sync_peers(
        self, shapes: dict[str, tuple[int, ...]], where: str, *, bucket_bytes: int, transport: str
    ) -> SyncPeers:
        """Collective: connect with the ranks of all servers (`Engine.sync_peers`).

        Raises:
            RuntimeError: a server did not connect in time (names it).
        """
        group = self.meet(shapes, where, bucket_bytes=bucket_bytes, transport=transport)
        return SyncPeers(group, self.replicas, self.announce)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingRequest,
        on_completion: Callable[[int, int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """G completions per prompt; `Engine.generate`.

        Raises:
            RuntimeError: asleep, in the middle of an update, before the first sync, or the server failed, is gone or
                stands still (names it).
            ValueError: a prompt and its completion do not fit `max_model_len`, or the servers tell no experts.
        """
        self._check_ready(prompts, sampling)
        return in_groups(self._rollouts(prompts, sampling), len(prompts), sampling.group_size, on_completion)

    def sleep(self) -> None:
        """Releases nothing: nobody else wants the server's devices."""
        self._asleep = {"kv_cache", "weights"}

    def wake(self, what: Literal["weights", "kv_cache"]) -> None:
        self._asleep.discard(what)

    def close(self) -> None:
        """The servers are free for other jobs. A second call does nothing."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def _connect(self, number: int, facts: dict[str, Any]) -> str | None:
        """What is wrong with this group's server."""
        try:
            self._link = ServerClient(
                self._names[number],
                self._addresses[number],
                read_token(),
                facts,
                patience_seconds=self._timeout * _CONNECT_SHARE,
                timeout_seconds=self._timeout,
            )
        except UserError as error:
            return str(error)
        return None

    def _check(self) -> None:
        if self._link is not None:
            self._link.check()

    def _check_ready(self, prompts: Sequence[Prompt], sampling: SamplingRequest) -> None:
        require_ready(self._asleep, updating=self._sink.updating, policy_version=self.policy_version)
        if sampling.expert_choices and not self._tell_experts:
            raise ValueError("expert_choices of servers that were started without algorithm.routing_replay")
        check_lengths(prompts, sampling, self._max_model_len)

    def _rollouts(
        self, prompts: Sequence[Prompt], sampling: SamplingRequest
    ) -> Generator[tuple[int, int, Completion], None, None]:
        for position, member, completion in self._ranks.broadcast_stream(self._sampled(prompts, sampling)):
            if completion.policy_version != self.policy_version:
                raise RuntimeError(
                    f"an engine server sampled with weights of version {completion.policy_version}, the policy has "
                    f"sent version {self.policy_version}"
                )
            yield position, member, completion

    def _sampled(
        self, prompts: Sequence[Prompt], sampling: SamplingRequest
    ) -> Iterator[tuple[int, int, Completion] | None]:
        if self._link is None:
            return
        command = sample_command(prompts, sampling, self.policy_version)
        for part in self._link.stream("sample", command, self._ranks.beat_seconds):
            yield read_rollout(part) if isinstance(part, ServerMessage) else None


class ServedSink:
    """`WeightSink` of a rank whose engine's weights are elsewhere: it has no region, and only counts the versions."""

    supports_slices = True
    streaming_reason = ""

    def __init__(self) -> None:
        self.policy_version = -1
        self.updating = False

    def layout(self) -> Sequence[SinkRegion]:
        return ()

    def begin_update(self) -> None:
        self.updating = True

    def write(self, hf: TensorSlice, values: Tensor) -> None:
        """Raises AssertionError: nothing is written here."""
        raise AssertionError(f"{hf} on a rank without regions")

    def memory_of(self, hf: TensorSlice) -> Tensor | None:
        return None

    def load(self, name: str, tensor: Tensor) -> None:
        """Raises AssertionError: nothing is streamed here."""
        raise AssertionError(f"{name} on a rank without an engine")

    def end_update(self, policy_version: int) -> None:
        self.policy_version, self.updating = policy_version, False

    def digests(self, slices: Sequence[TensorSlice]) -> list[int]:
        """Raises AssertionError: nothing is held here."""
        assert not slices, f"{slices[0]} on a rank without regions"
        return []

    def probe(self) -> dict[str, str]:
        return {}


def _address_towards(other: Address) -> str:
    """This machine's address on the way to `other`; nothing is sent."""
    family, kind, _, _, at = socket.getaddrinfo(other.host, other.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(at)
        return str(probe.getsockname()[0])
