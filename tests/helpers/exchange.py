"""Turns between two ranks by one transport of a machine: what a receiver finds in each of them."""

from __future__ import annotations

import torch
import torch.distributed as dist

from grpo_mega.parallel.peer_group import job_peer_group
from grpo_mega.weight_sync.transports.base import BucketMessage, Round
from grpo_mega.weight_sync.transports.factory import make_transports

NUM_TURNS, SYNCS = 7, 2
NUM_BYTES = 1 << 20


def pattern(sender: int, sync: int, turn: int) -> torch.Tensor:
    """What `sender` puts into a turn."""
    generator = torch.Generator().manual_seed(1000 * sender + 100 * sync + turn)
    return torch.randint(0, 256, (NUM_BYTES - 64 * turn,), generator=generator, dtype=torch.uint8)


def exchange(rank: int, kind: str) -> list[str]:
    """On both ranks; the turns in which a rank found something else."""
    other = 1 - rank
    messages = [BucketMessage(other, 0, NUM_BYTES - 64 * n) for n in range(NUM_TURNS)]
    turns = [Round(n, [message], [message]) for n, message in enumerate(messages)]
    transports, _ = make_transports({kind: turns}, 60.0, job_peer_group())
    transport, wrong = transports[kind], []
    for sync in range(SYNCS):
        for n in range(NUM_TURNS + 1):
            if n < NUM_TURNS:
                transport.outgoing(turns[n])[: turns[n].sends[0].num_bytes].copy_(pattern(rank, sync, n))
                transport.start(turns[n])
            if n:
                found = transport.incoming(turns[n - 1], turns[n - 1].receives[0]).cpu()
                if not torch.equal(found, pattern(other, sync, n - 1)):
                    wrong.append(f"turn {n - 1} of sync {sync}")
                transport.finish(turns[n - 1])
    dist.barrier()
    return wrong
