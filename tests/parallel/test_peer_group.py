"""Ranks of several programs form a process group beside their default groups and exchange plain objects."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

from grpo_mega.parallel.loopback import open_store
from grpo_mega.parallel.peer_group import (
    PeerFailedError,
    PeerGroup,
    find_store,
    job_peer_group,
    join_peers,
    read_plain,
)
from grpo_mega.parallel.topology import Topology
from tests.helpers.ranks import RankPool


def open_common_store(rank: int, folder: Path) -> dist.TCPStore:
    """Return this rank's connection to a store that rank 0 opens."""
    if rank == 0:
        store = open_store("127.0.0.1", 0, 30.0)
        (folder / "tmp").write_text(str(store.port))
        (folder / "tmp").rename(folder / "port")
    dist.barrier()
    return store if rank == 0 else find_store("127.0.0.1", int((folder / "port").read_text()), 30.0)


def exchange_objects(rank: int, folder: Path) -> tuple[list[object], list[float], list[str], int]:
    """Exchange objects between ranks 0 and 1 of one program and rank 2 of another; default groups must not change."""
    program = dist.new_group([0, 1]) if rank < 2 else None
    store = open_common_store(rank, folder)
    peers = join_peers(store, 2 - rank, ["server", "rank 1", "rank 0"], 30.0)
    gathered = peers.gather({"rank": rank, "numbers": np.arange(rank), "dtype": torch.bfloat16, "grid": Topology(2)})
    tensor = torch.tensor([float(rank)])
    peers.broadcast(tensor, 2)
    del program
    numbers = [str(each["numbers"]) for each in gathered]
    return [each["rank"] for each in gathered], tensor.tolist(), numbers, dist.get_rank()


def test_ranks_of_two_programs_exchange_objects_in_the_order_of_their_group(
    rank_pool: RankPool, tmp_path: Path
) -> None:
    found = rank_pool.call(3, exchange_objects, tmp_path)
    assert found == [([2, 1, 0], [0.0], ["[0 1]", "[0]", "[]"], rank) for rank in range(3)]


def join_alone(rank: int, fault: str) -> str:
    def check_others() -> None:
        if fault:
            raise RuntimeError(fault)

    with pytest.raises(RuntimeError) as caught:
        join_peers(open_store("127.0.0.1", 0, 5.0), rank, ["rank 0", "engine server host:7"], 2.5, check_others)
    return str(caught.value)


def test_a_rank_that_does_not_join_is_named(rank_pool: RankPool) -> None:
    (message,) = rank_pool.call(1, join_alone, "")
    assert message.startswith("rank 0 timed out")
    assert message.endswith("waiting for engine server host:7")


def test_the_rendezvous_ends_when_another_rank_has_exited(rank_pool: RankPool) -> None:
    assert rank_pool.call(1, join_alone, "host:7 is gone") == ["host:7 is gone"]


def gather_alone(rank: int, folder: Path) -> str:
    peers = join_peers(open_common_store(rank, folder), rank, ["rank 0", "rank 1"], 5.0)
    if rank == 1:
        return ""
    with pytest.raises(RuntimeError) as caught:  # not the ValueError of torch.distributed's own functions
        peers.gather("rank 1 does not take part")
    return str(caught.value)


def test_a_gather_without_one_of_the_ranks_is_an_error_of_the_group(rank_pool: RankPool, tmp_path: Path) -> None:
    message, _ = rank_pool.call(2, gather_alone, tmp_path)
    assert "not initialized in the world group map" not in message


def wait_for_each_other(rank: int, folder: Path) -> str:
    """Rank 1 reports a failure, which ends the wait of rank 0 before its timeout."""
    peers = PeerGroup(job_peer_group().group, open_common_store(rank, folder))
    if rank == 1:
        peers.report_failure("rank 1: the server is gone")
        return ""
    with pytest.raises(PeerFailedError) as caught:
        peers.await_keys(["never"], 600.0)
    return str(caught.value)


def test_a_reported_failure_ends_the_wait_of_the_other_ranks(rank_pool: RankPool, tmp_path: Path) -> None:
    assert rank_pool.call(2, wait_for_each_other, tmp_path) == ["rank 1: the server is gone", ""]


@dataclass
class Foreign:
    """A dataclass that is not part of the project."""

    number: int = 0


@pytest.mark.parametrize(("value", "name"), [(print, "builtins.print"), (Foreign(), "Foreign"), (Path("/"), "pathlib")])
def test_functions_and_foreign_classes_are_not_unpickled(value: object, name: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match=rf"{name}.* is not allowed in rank-to-rank messages"):
        read_plain(pickle.dumps(value))


def test_functions_of_the_project_are_not_unpickled() -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"grpo_mega\.parallel\.loopback\.open_store is not allowed"):
        read_plain(pickle.dumps(open_store))


@pytest.mark.parametrize(("host", "addresses"), [("127.0.0.1", {"127.0.0.1"}), ("0.0.0.0", {"::", "0.0.0.0"})])
def test_a_store_on_loopback_is_not_on_other_interfaces(host: str, addresses: set[str]) -> None:
    store = open_store(host, 0, 5.0)
    bound = {
        each.laddr.ip
        for each in psutil.Process().net_connections("inet")
        if each.status == psutil.CONN_LISTEN and each.laddr.port == store.port
    }
    assert bound
    assert bound <= addresses
