"""Engines on other devices: each group of ranks uses an engine that a server of its own runs (serve.py).

The ranks of the job are divided into as many contiguous groups as there are servers. The first rank of a group is the
client of its server and broadcasts the rollouts to the others one by one, so no rank waits longer than a heartbeat.
Every rank sends its shards of the weights to the servers' ranks, in one process group of the job and all servers.
Asserted by tests/parallel/test_servers.py, tests/engine/test_engine_contract.py and tests/e2e/test_server.py.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Literal, cast

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store  # torch.distributed has this name, and its type hints do not

from grpo_mega.engines.output_checks import OutputLimits
from grpo_mega.engines.replica_broadcast import ReplicaBroadcast
from grpo_mega.engines.request_checks import check_lengths, in_groups, require_ready
from grpo_mega.engines.server.claim import Claimed, log_unavailable_spares
from grpo_mega.engines.server.client import ServerClient
from grpo_mega.engines.server.messages import (
    MeetCommand,
    PushCommand,
    ServingFacts,
    Transport,
    read_completion,
    sample_command,
)
from grpo_mega.engines.server.protocol import Address, NamedServer, named_servers, read_token
from grpo_mega.interfaces import SinkRegion, SyncPeers, WeightSink
from grpo_mega.observe.engine_gauges import EngineGauges
from grpo_mega.parallel.loopback import open_store
from grpo_mega.parallel.peer_group import PeerGroup, find_store, join_peers, report_failure
from grpo_mega.parallel.ports import is_loopback
from grpo_mega.types import Completion, Prompt, SamplingRequest, TensorSlice, UserError

log = logging.getLogger("grpo_mega.engines")

_CANCEL_SECONDS = 1.0
_PATIENCE_SHARE = 0.8  # of the timeout: the ranks that wait for the connecting rank have the whole timeout


class ServerEngine:
    """`Engine` whose replicas are the servers at `urls`. A weight sync must precede the first `generate`.

    Args:
        urls: addresses of the servers, in the order of the groups of ranks that use them.
        spare_urls: addresses of servers that take the place of one that is not available.
        tp: number of ranks of each server.
        facts: settings that each server must have in common with this job.
        max_model_len: longest prompt plus completion, tokens.
        vocab_size: of the model.
        tell_experts: the servers can answer requests with `expert_choices`.
        timeout_seconds: limit of every wait.

    Raises:
        UserError: on all ranks; no server is available for a group, or its server has an incompatible configuration.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        spare_urls: Sequence[str] = (),
        tp: int,
        facts: ServingFacts,
        max_model_len: int,
        vocab_size: int,
        tell_experts: bool,
        timeout_seconds: float,
    ) -> None:
        world_size, rank = dist.get_world_size(), dist.get_rank()
        if world_size % len(urls):
            raise UserError(
                f"engine.urls names {len(urls)} servers, which does not divide the {world_size} ranks of the job",
                remedy="name a number of servers that divides run.world_size",
            )
        own, spare = named_servers("engine.urls", urls), named_servers("engine.spare_urls", spare_urls)
        self._tp, self._max_model_len, self._tell_experts = tp, max_model_len, tell_experts
        self._vocab_size = vocab_size
        self._timeout = timeout_seconds
        self._ranks = ReplicaBroadcast(world_size // len(urls), timeout_seconds)
        self._client: ServerClient | None = None
        self._store: Store | None = None  # rank 0 keeps it open: ranks and servers read failures from it
        self._index = rank // (world_size // len(urls))
        claimed = self._connect([own[self._index], *spare], facts) if self._ranks.is_first else None
        found: list[Claimed | str | None] = [None] * world_size
        dist.all_gather_object(found, claimed)
        if errors := [each for each in found if isinstance(each, str)]:
            self.close()
            raise UserError("\n".join(errors))
        by_group = [each for each in found if isinstance(each, Claimed)]
        self._servers = [each.server for each in by_group]
        """Server of each group of ranks."""
        if rank == 0:
            for before, now in zip(own, by_group, strict=True):
                if now.reason:
                    log.warning("%s takes the place of %s: %s", now.server.name, before.name, now.reason)
            free = [each for each in spare if each not in self._servers]
            self._spare_check = log_unavailable_spares(free, facts, read_token())
        self._sink = ServedSink()
        self._asleep: set[str] = set()
        self.steps = 0
        """Number of completions so far."""

    @property
    def policy_version(self) -> int:
        """Number of updates behind the servers' weights; -1 before the first sync."""
        return self._sink.policy_version

    @property
    def sink(self) -> WeightSink:
        """A sink without regions: the weights go to the ranks of the servers."""
        return self._sink

    @property
    def replicas(self) -> list[list[int]]:
        """Ranks of each server in the peer group of `sync_peers`. They follow the ranks of the job."""
        first = dist.get_world_size()
        return [list(range(first + i * self._tp, first + (i + 1) * self._tp)) for i in range(len(self._servers))]

    def announce(self, policy_version: int, verify: bool) -> None:
        """Ask the servers to take part in a weight sync."""
        if self._client is not None:
            self._client.start(PushCommand(policy_version, verify))

    def sync_peers(
        self, shapes: dict[str, tuple[int, ...]], where: str, *, bucket_bytes: int, transport: str
    ) -> SyncPeers:
        """Form the peer group of the job and all servers; see `Engine.sync_peers`. Collective over the job.

        Each server builds its end of the weight sync in the meantime.

        Args:
            shapes: of every tensor that the policy holds, by its Hugging Face name.
            where: this rank's coordinates, for messages.
            bucket_bytes: bucket size of the sync.
            transport: of the sync, as in `weight_sync.transport`.

        Raises:
            RuntimeError: a server does not join in time (names it).
        """
        group = self._form_peer_group(shapes, where, bucket_bytes, cast("Transport", transport))
        return SyncPeers(group, self.replicas, self.announce)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingRequest,
        on_completion: Callable[[int, int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample G completions per prompt; see `Engine.generate`.

        Raises:
            RuntimeError: the engine is asleep, in the middle of an update or before its first sync; or the server
                failed, is gone or is not responding (names it).
            InvalidCompletionError: a completion cannot be right.
            ValueError: a prompt and its completion do not fit `max_model_len`, or the servers do not return
                `expert_choices`.
        """
        self._check_ready(prompts, sampling)
        limits = OutputLimits("the engine server", self._vocab_size, self.policy_version)
        received = self._receive_rollouts(prompts, sampling, self._ranks.beat_seconds)
        rollouts = self._checked(self._ranks.broadcast_stream(received))
        return in_groups(rollouts, prompts, sampling, limits, on_completion)

    def generate_on_this_rank(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingRequest,
        on_completion: Callable[[int, int, Completion], None] | None = None,
        *,
        is_cancelled: Callable[[], bool],
    ) -> list[list[Completion]]:
        """Sample on the first rank of a group, in any thread, without the other ranks of the group.

        No other call may use the server meanwhile. It works while the engine is asleep: a server has devices of its
        own. The other arguments and the errors are those of `generate`.

        Args:
            prompts: of the call.
            sampling: of the call.
            on_completion: called with each completion.
            is_cancelled: asked at least every second; True ends the call with a RuntimeError.
        """
        assert self._client is not None, "only the first rank of a group has a connection to its server"
        require_ready((), updating=self._sink.updating, policy_version=self.policy_version)
        self._check_request(prompts, sampling)

        def received() -> Iterator[tuple[int, int, Completion]]:
            for rollout in self._receive_rollouts(prompts, sampling, _CANCEL_SECONDS):
                if is_cancelled():
                    raise RuntimeError("the call was cancelled")
                if rollout is not None:
                    yield rollout

        limits = OutputLimits("the engine server", self._vocab_size, self.policy_version)
        return in_groups(self._checked(received()), prompts, sampling, limits, on_completion)

    def take_gauges(self) -> EngineGauges:
        """Return the server's gauges since the last call; empty on all ranks of the group but the first."""
        return EngineGauges() if self._client is None else self._client.take_gauges()

    def fault(self) -> str:
        """Return why the server cannot be used any more, or an empty string; on the first rank of the group."""
        try:
            self._check()
        except RuntimeError as error:
            return str(error)
        return ""

    def sleep(self) -> None:
        """Release nothing: the server's devices have no other user."""
        self._asleep = {"kv_cache", "weights"}

    def wake(self, what: Literal["weights", "kv_cache"]) -> None:
        self._asleep.discard(what)

    def close(self) -> None:
        """Release the servers for other jobs. A second call does nothing."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _form_peer_group(
        self, shapes: dict[str, tuple[int, ...]], where: str, bucket_bytes: int, transport: Transport
    ) -> PeerGroup:
        size = dist.get_world_size()
        names: list[str] = [""] * size
        dist.all_gather_object(names, where)
        names += [f"engine server {s.name}, rank {t} of {self._tp}" for s in self._servers for t in range(self._tp)]
        master, store = os.environ.get("MASTER_ADDR", "127.0.0.1"), None
        shared: list[tuple[int, list[str]] | None] = [None]
        if dist.get_rank() == 0:
            own = [_local_address(each.address) for each in self._servers]
            remote = [each for each in (master, *own) if not is_loopback(each)]
            store = open_store(remote[0] if remote else master, 0, self._timeout)
            shared = [(store.port, own)]
        dist.broadcast_object_list(shared, src=0)
        assert shared[0] is not None, "rank 0 broadcast the store's addresses"
        port, addresses = shared[0]
        if store is None:
            store = find_store(master, port, self._timeout)
        self._store = store
        try:
            if self._client is not None:
                self._client.start(
                    MeetCommand(
                        address=addresses[self._index],
                        port=port,
                        names=tuple(names),
                        first_rank=self.replicas[self._index][0],
                        replicas=tuple(map(tuple, self.replicas)),
                        shapes=shapes,
                        bucket_bytes=bucket_bytes,
                        transport=transport,
                        timeout_seconds=self._timeout,
                    )
                )
            return join_peers(store, dist.get_rank(), names, self._timeout, self._check)
        except RuntimeError as error:
            report_failure(store, str(error))  # the other ranks wait in `join_peers`
            raise

    def _connect(self, servers: Sequence[NamedServer], facts: ServingFacts) -> Claimed | str:
        """Claim one of the servers and return it, or the text of the error, which the other ranks need too."""
        try:
            self._client = ServerClient(
                servers,
                read_token(),
                facts,
                patience_seconds=self._timeout * _PATIENCE_SHARE,
                timeout_seconds=self._timeout,
            )
        except UserError as error:
            return str(error)
        return self._client.claimed

    def _check(self) -> None:
        if self._client is not None:
            self._client.check()

    def _check_ready(self, prompts: Sequence[Prompt], sampling: SamplingRequest) -> None:
        require_ready(self._asleep, updating=self._sink.updating, policy_version=self.policy_version)
        self._check_request(prompts, sampling)

    def _check_request(self, prompts: Sequence[Prompt], sampling: SamplingRequest) -> None:
        if sampling.expert_choices and not self._tell_experts:
            raise ValueError("expert_choices is not supported by servers started without algorithm.routing_replay")
        check_lengths(prompts, sampling, self._max_model_len)

    def _checked(
        self, rollouts: Iterator[tuple[int, int, Completion]]
    ) -> Generator[tuple[int, int, Completion], None, None]:
        for position, member, completion in rollouts:
            if completion.policy_version != self.policy_version:
                raise RuntimeError(
                    f"an engine server sampled with weights of version {completion.policy_version}, but the policy "
                    f"sent version {self.policy_version}"
                )
            self.steps += 1
            yield position, member, completion

    def _receive_rollouts(
        self, prompts: Sequence[Prompt], sampling: SamplingRequest, heartbeat_seconds: float
    ) -> Iterator[tuple[int, int, Completion] | None]:
        if self._client is None:
            return
        command = sample_command(prompts, sampling, self.policy_version)
        for reply in self._client.stream(command, heartbeat_seconds):
            yield None if reply is None else (reply.position, reply.member, read_completion(reply))


class ServedSink:
    """`WeightSink` of a rank whose engine runs in a server: it has no regions, and only records the version."""

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
        """Raise AssertionError: this sink has no regions."""
        raise AssertionError(f"{hf}: write to a sink without regions")

    def memory_of(self, hf: TensorSlice) -> Tensor | None:
        return None

    def load(self, name: str, tensor: Tensor) -> None:
        """Raise AssertionError: servers receive slices, never whole tensors."""
        raise AssertionError(f"{name}: load into a sink without regions")

    def end_update(self, policy_version: int) -> None:
        self.policy_version, self.updating = policy_version, False

    def digests(self, slices: Sequence[TensorSlice]) -> list[int]:
        """Return no digests. Raise AssertionError for a slice: this sink has no regions."""
        assert not slices, f"{slices[0]}: digest of a sink without regions"
        return []

    def probe(self) -> dict[str, str]:
        return {}


def _local_address(remote: Address) -> str:
    """Return this machine's address on the route to `remote`. Sends nothing."""
    family, kind, _, _, resolved = socket.getaddrinfo(remote.host, remote.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(resolved)
        return str(probe.getsockname()[0])
