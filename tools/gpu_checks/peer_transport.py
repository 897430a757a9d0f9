"""Part `cuda_ipc` of tools/gpu_proof.py: two processes exchange buffers on one device through CUDA IPC.

A rehearsal uses the same transport with buffers in shared host memory.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from grpo_mega.parallel.peer_group import job_peer_group
from grpo_mega.weight_sync.transports.base import BucketMessage, Round
from grpo_mega.weight_sync.transports.factory import make_transports
from tools.gpu_checks.exchange import NUM_ROUNDS, SYNCS, exchange_on_two_ranks
from tools.gpu_checks.part_job import PartJob

_ROUNDS, _BYTES = 8, 256 * 2**20  # of the measured exchange, each way


def main(job: PartJob) -> None:
    """Compare every byte of small rounds, then measure large ones."""
    kind = "cuda_ipc" if job.on_gpu else "shared_memory"
    with tempfile.TemporaryDirectory(prefix="gpu_proof_") as work:
        size = _BYTES if job.on_gpu else 2**16
        spawn(_on_rank, (kind, str(job.device), size, work), nprocs=2)
        wrong = [line for rank in (0, 1) for line in (Path(work) / f"wrong_{rank}").read_text().splitlines()]
        seconds = max(float((Path(work) / f"seconds_{rank}").read_text()) for rank in (0, 1))
    job.result.check(
        "rounds with other bytes than were sent", wrong, [], passed=not wrong,
        reason=f"{NUM_ROUNDS} rounds of {SYNCS} syncs are compared byte for byte",
    )  # fmt: skip
    speed = _ROUNDS * size / seconds / 1e9
    job.result.add(transport=kind, gb_per_second=speed, round_bytes=size, rounds=_ROUNDS)
    job.result.put(
        main=f"{kind}: every byte arrived, {speed:.3g} GB/s each way" if not wrong else f"{kind}: wrong bytes"
    )


def _on_rank(rank: int, kind: str, device: str, num_bytes: int, work: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device))
    dist.init_process_group("gloo", init_method=f"file://{work}/store", rank=rank, world_size=2)
    wrong = exchange_on_two_ranks(rank, kind)
    (Path(work) / f"wrong_{rank}").write_text("\n".join(wrong))
    seconds = _seconds_of_rounds(rank, kind, torch.device(device), num_bytes)
    (Path(work) / f"seconds_{rank}").write_text(repr(seconds))
    dist.barrier()
    dist.destroy_process_group()


def _seconds_of_rounds(rank: int, kind: str, device: torch.device, num_bytes: int) -> float:
    """Return the seconds of all rounds, in which a buffer is filled, sent, and copied out of the sender's memory."""
    messages = [BucketMessage(1 - rank, 0, num_bytes) for _ in range(_ROUNDS)]
    rounds = [Round(n, [message], [message]) for n, message in enumerate(messages)]
    transports, _ = make_transports({kind: rounds}, 60.0, job_peer_group())
    transport = transports[kind]
    source = torch.full((num_bytes,), rank, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    dist.barrier()
    begin = time.perf_counter()
    for round_ in rounds:
        transport.outgoing(round_)[:num_bytes].copy_(source)
        transport.start(round_)
        target.copy_(transport.incoming(round_, round_.receives[0]))
        transport.finish(round_)
    seconds = time.perf_counter() - begin
    assert bool((target == 1 - rank).all()), "the last round holds other bytes than were sent"
    return seconds
