"""Rounds between two ranks over one transport, and the bytes that each receiver finds."""

from __future__ import annotations

import torch
import torch.distributed as dist

from grpo_mega.parallel.peer_group import job_peer_group
from grpo_mega.weight_sync.transports.base import BucketMessage, Round
from grpo_mega.weight_sync.transports.factory import make_transports

NUM_ROUNDS, SYNCS = 7, 2
NUM_BYTES = 1 << 20


def expected_bytes(sender: int, sync: int, number: int) -> torch.Tensor:
    """Return the bytes that `sender` sends in a round."""
    generator = torch.Generator().manual_seed(1000 * sender + 100 * sync + number)
    return torch.randint(0, 256, (NUM_BYTES - 64 * number,), generator=generator, dtype=torch.uint8)


def exchange_on_two_ranks(rank: int, kind: str) -> list[str]:
    """Run on both ranks; return the rounds in which this rank received other bytes than were sent."""
    other = 1 - rank
    messages = [BucketMessage(other, 0, NUM_BYTES - 64 * n) for n in range(NUM_ROUNDS)]
    rounds = [Round(n, [message], [message]) for n, message in enumerate(messages)]
    transports, _ = make_transports({kind: rounds}, 60.0, job_peer_group())
    transport, wrong = transports[kind], []
    for sync in range(SYNCS):
        for n in range(NUM_ROUNDS + 1):
            if n < NUM_ROUNDS:
                transport.outgoing(rounds[n])[: rounds[n].sends[0].num_bytes].copy_(expected_bytes(rank, sync, n))
                transport.start(rounds[n])
            if n:
                found = transport.incoming(rounds[n - 1], rounds[n - 1].receives[0]).cpu()
                if not torch.equal(found, expected_bytes(other, sync, n - 1)):
                    wrong.append(f"round {n - 1} of sync {sync}")
                transport.finish(rounds[n - 1])
    dist.barrier()
    return wrong
