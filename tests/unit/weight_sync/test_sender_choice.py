"""Sender choice: equal to a simple greedy choice, and the lower bound holds for every possible choice."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict

import numpy as np
import pytest

from grpo_mega.weight_sync.sender_choice import REMOTE_LINKS, Flows, choose_senders, lower_bounds
from grpo_mega.weight_sync.slice_table import Ints


def random_flows(seed: int, ranks: int = 6, flows: int = 6) -> Flows:
    choose = random.Random(seed)
    holders = sorted({tuple(sorted(choose.sample(range(ranks), choose.randint(1, 4)))) for _ in range(5)})
    return Flows(
        np.asarray([choose.choice([1, 2, 3, 5, 8, 13]) for _ in range(flows)], np.int64),
        np.asarray([choose.randrange(len(holders)) for _ in range(flows)], np.int64),
        np.asarray([choose.randrange(ranks) for _ in range(flows)], np.int64),
        holders,
        tuple(rank * choose.choice([1, 2]) // ranks for rank in range(ranks)),
    )


def candidates(flows: Flows, f: int) -> tuple[int, ...]:
    holders, dst = flows.holders[int(flows.source[f])], int(flows.dst[f])
    if dst in holders:
        return (dst,)
    return tuple(rank for rank in holders if flows.nodes[rank] == flows.nodes[dst]) or holders


def busiest(flows: Flows, src: Ints | tuple[int, ...]) -> dict[str, int]:
    """Return the most bytes that a rank sends, or receives, over each link."""
    sums: defaultdict[tuple[str, str, int], int] = defaultdict(int)
    for f, sender in enumerate(src):
        dst = int(flows.dst[f])
        if sender != dst:
            link = REMOTE_LINKS[flows.nodes[int(sender)] != flows.nodes[dst]]
            sums[link, "sends", int(sender)] += int(flows.sizes[f])
            sums[link, "receives", dst] += int(flows.sizes[f])
    return {link: max((n for (of, _, _), n in sums.items() if of == link), default=0) for link in REMOTE_LINKS}


def greedy_senders(flows: Flows) -> list[int]:
    """Choose senders by definition: first flows with one candidate, then the largest, by the least load."""
    options = [candidates(flows, f) for f in range(len(flows.sizes))]
    load: defaultdict[tuple[bool, int], int] = defaultdict(int)
    chosen = [each[0] for each in options]
    order = sorted(range(len(options)), key=lambda f: (len(options[f]) > 1, -int(flows.sizes[f]), f))
    for f in order:
        far = flows.nodes[options[f][0]] != flows.nodes[int(flows.dst[f])]
        chosen[f] = min(options[f], key=lambda rank, far=far: (load[far, rank], rank))  # type: ignore[misc]
        if chosen[f] != flows.dst[f]:
            load[far, chosen[f]] += int(flows.sizes[f])
    return chosen


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_senders_equal_those_of_the_greedy_choice(first: int) -> None:
    for seed in range(first, first + 100):
        flows = random_flows(seed, ranks=8, flows=40)
        src = choose_senders(flows, np.arange(len(flows.sizes)), flows.sizes)
        assert src.tolist() == greedy_senders(flows), seed


def test_parts_of_a_flow_are_sent_as_flows_of_their_size() -> None:
    flows = random_flows(3, ranks=8, flows=20)
    columns = [np.repeat(column, 2) for column in (flows.sizes, flows.source, flows.dst)]
    twice = Flows(*columns, flows.holders, flows.nodes)
    src = choose_senders(flows, np.repeat(np.arange(20), 2), np.repeat(flows.sizes, 2))
    assert src.tolist() == greedy_senders(twice)


def test_no_choice_beats_the_lower_bound_and_the_chosen_one_is_at_most_a_third_above_the_best() -> None:
    met = 0
    for seed in range(150):
        flows = random_flows(seed)
        bounds = lower_bounds(flows)
        every = [busiest(flows, src) for src in itertools.product(*(candidates(flows, f) for f in range(6)))]
        src = choose_senders(flows, np.arange(6), flows.sizes)
        for link in REMOTE_LINKS:
            best = min(each[link] for each in every)
            assert bounds[link] <= best
            met += bounds[link] == best
            assert busiest(flows, src)[link] <= best * 4 / 3 + 1
    assert met > 250, "the bound is loose"
