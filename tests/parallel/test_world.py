"""Ranks of several programs meet beside their own groups; what they tell each other is made of plain values."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from grpo_mega.parallel.peer_group import find_store, join_peers, open_store, read_plain
from grpo_mega.parallel.topology import Topology
from tests.helpers.ranks import RankPool


def meets(rank: int, folder: Path) -> tuple[list[object], list[float], list[str], int]:
    """Ranks 0 and 1 are one program, rank 2 another: their own groups stay as they are."""
    program = dist.new_group([0, 1]) if rank < 2 else None
    if rank == 0:
        store = open_store(30.0)
        (folder / "tmp").write_text(str(store.port))
        (folder / "tmp").rename(folder / "port")
    dist.barrier()
    if rank:
        store = find_store("127.0.0.1", int((folder / "port").read_text()), 30.0)
    world = join_peers(store, 2 - rank, ["server", "rank 1", "rank 0"], 30.0)
    told = world.gather({"rank": rank, "numbers": np.arange(rank), "dtype": torch.bfloat16, "grid": Topology(2)})
    words = torch.tensor([float(rank)])
    world.broadcast(words, 2)
    del program
    return [each["rank"] for each in told], words.tolist(), [str(each["numbers"]) for each in told], dist.get_rank()


def test_ranks_meet_in_an_order_of_their_own(rank_pool: RankPool, tmp_path: Path) -> None:
    found = rank_pool.call(3, meets, tmp_path)
    assert found == [([2, 1, 0], [0.0], ["[0 1]", "[0]", "[]"], rank) for rank in range(3)]


def comes_alone(rank: int, fault: str) -> str:
    def look() -> None:
        if fault:
            raise RuntimeError(fault)

    with pytest.raises(RuntimeError) as caught:
        join_peers(open_store(5.0), rank, ["rank 0", "engine server host:7"], 2.5, look)
    return str(caught.value)


def test_who_does_not_come_is_named(rank_pool: RankPool) -> None:
    assert rank_pool.call(1, comes_alone, "") == ["rank 0 waited in vain for engine server host:7"]


def test_who_is_known_to_be_gone_is_not_waited_for(rank_pool: RankPool) -> None:
    assert rank_pool.call(1, comes_alone, "host:7 has ended") == ["host:7 has ended"]


@dataclass
class Foreign:
    """Not the project's."""

    number: int = 0


@pytest.mark.parametrize(("value", "name"), [(print, "builtins.print"), (Foreign(), "Foreign"), (Path("/"), "pathlib")])
def test_what_could_do_something_is_not_read(value: object, name: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match=rf"{name}.* is nothing that ranks tell each other"):
        read_plain(pickle.dumps(value))


def test_functions_of_the_project_are_not_read_either() -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"grpo_mega\.parallel\.world\.open_store is nothing"):
        read_plain(pickle.dumps(open_store))
