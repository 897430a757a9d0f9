"""The messages of one rank are split into the same parts at both ends."""

from __future__ import annotations

import pytest
import torch

from grpo_mega.parallel.topology import Topology
from grpo_mega.weight_sync.plan import plan_reshard
from grpo_mega.weight_sync.rank_schedule import HEADER_BYTES, RankSchedule, schedule_of_rank
from grpo_mega.weight_sync.transports.base import BucketMessage
from tests.helpers.memory_ends import dtype_of
from tests.helpers.weight_layouts import TENSORS, EngineLayout, engine, policy

WORLD = 4


@pytest.mark.parametrize(
    ("large", "parts"),
    [
        ((), [(0, 100)]),
        (((64, 36),), [(0, 64), (64, 36)]),
        (((10, 20), (30, 40)), [(0, 10), (10, 20), (30, 40), (70, 30)]),
        (((10, 20), (50, 50)), [(0, 10), (10, 20), (30, 20), (50, 50)]),
    ],
)
def test_a_message_is_split_around_its_large_pieces(
    large: tuple[tuple[int, int], ...], parts: list[tuple[int, int]]
) -> None:
    assert list(BucketMessage(1, 0, 100, large).parts()) == parts


def schedules(kind: str) -> list[RankSchedule]:
    held, wanted = (
        policy(
            Topology(WORLD, tp=2, pp=2),
        ),
        engine(EngineLayout(2), WORLD),
    )
    plan = plan_reshard(TENSORS, held, wanted, [0, 1, 0, 2], 1 << 22)
    dtypes: dict[str, torch.dtype] = {name: dtype_of(name) for name in TENSORS}
    return [schedule_of_rank(plan, rank, dtypes, {"same_node": kind, "across_nodes": "gloo"}) for rank in range(WORLD)]


@pytest.mark.parametrize("kind", ["gloo", "shared_memory"])
def test_both_ends_split_a_message_alike_and_only_gloo_sends_in_place(kind: str) -> None:
    ranks = schedules(kind)
    num_large = dict.fromkeys(("gloo", "shared_memory"), 0)
    for mine in ranks:
        for each, rounds in mine.rounds.items():
            for round_ in rounds:
                for sent in round_.sends:
                    (received,) = [
                        m for m in ranks[sent.peer].rounds[each][round_.number].receives if m.peer == mine.rank
                    ]
                    assert received == BucketMessage(mine.rank, sent.start, sent.num_bytes, sent.large)
                    pieces = mine.pieces[round_.number, mine.rank, sent.peer]
                    assert sent.num_bytes == HEADER_BYTES + sum(piece.num_bytes for piece in pieces)
                    assert set(sent.large) <= {(piece.start, piece.num_bytes) for piece in pieces}
                    num_large[each] += len(sent.large)
    assert num_large["gloo"] > 0
    assert num_large["shared_memory"] == 0
