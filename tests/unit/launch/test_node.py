"""The environment variables of the ranks of one machine."""

from __future__ import annotations

from grpo_mega.launch.node import Node
from grpo_mega.parallel.ports import port_is_free


def test_rank_environment_numbers_ranks_across_nodes() -> None:
    env = Node(2, 1, 4, "host0", 29500).rank_environment(3)
    assert env == {
        "RANK": "7",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "3",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "host0",
        "MASTER_PORT": "29500",
    }


def test_a_job_on_one_machine_gives_each_rank_the_shared_variables_and_its_own() -> None:
    node = Node.of_whole_job(2)
    assert port_is_free(node.master_port)
    shared = {
        "OMP_NUM_THREADS": "3",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(node.master_port),
    }
    assert node.environments({"OMP_NUM_THREADS": "3", "RANK": "of another job"}) == [
        {**shared, "RANK": "0", "LOCAL_RANK": "0"},
        {**shared, "RANK": "1", "LOCAL_RANK": "1"},
    ]
