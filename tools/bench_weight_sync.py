"""Measure a weight sync between ranks of this machine next to its lower bounds, in one run.

    python tools/bench_weight_sync.py [--megabytes 1024] [--bucket-megabytes 32] [--rounds 5] [--json]

Four ranks hold a bf16 model with TP2 x PP2 and fill two engines of two ranks, over shared memory and over gloo. Every
round measures the following; the best round of each counts:

- the sync without verification;
- a copy of the received bytes inside a process, and a copy of all bytes that an engine rank stores, a part of which is
  on its rank already;
- gathering: the same transport and buckets, with every tensor sent whole to every rank, which keeps its slices;
- the digests of both ends, and reading their bytes once.

Extra memory is the growth of the process during the sync.

Exit code 0: measured; 2: invalid input; 1: a rank failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_mega.cli.exit_codes import errors_as_exit_codes
from grpo_mega.interfaces import HeldSlice
from grpo_mega.models.digest import slice_digest
from grpo_mega.parallel.peer_group import job_peer_group
from grpo_mega.types import TensorSlice, UserError
from grpo_mega.weight_sync.executor import ScheduleExecutor
from grpo_mega.weight_sync.plan import plan_reshard
from grpo_mega.weight_sync.rank_schedule import schedule_of_rank
from grpo_mega.weight_sync.slice_table import RankSliceTable, SentTensor, as_slice, concatenate, table_of_rank
from grpo_mega.weight_sync.transports.factory import make_transports, transport_kinds
from grpo_mega.weight_sync.transports.kinds import TransportKind

WORLD, TP, PP = 4, 2, 2
HIDDEN, FFN, VOCAB = 2048, 8192, 32000
LAYER = {"q": (HIDDEN, 0), "k": (HIDDEN // 4, 0), "v": (HIDDEN // 4, 0), "gate": (FFN, 0), "up": (FFN, 0)}
LAYER_BYTES = 2 * (sum(rows for rows, _ in LAYER.values()) * HIDDEN + HIDDEN * HIDDEN + HIDDEN * FFN + 2 * HIDDEN)


def model(megabytes: int) -> tuple[dict[str, SentTensor], int]:
    """Return the tensors of a dense model of about that size, and its number of layers, a multiple of PP."""
    layers = max(PP, round((megabytes * 2**20 - 4 * VOCAB * HIDDEN) / LAYER_BYTES / PP) * PP)
    shapes: dict[str, tuple[int, ...]] = {"embed": (VOCAB, HIDDEN)}
    for i in range(layers):
        shapes |= {f"{i}.{name}": (rows, HIDDEN) for name, (rows, _) in LAYER.items()}
        shapes |= {f"{i}.o": (HIDDEN, HIDDEN), f"{i}.down": (HIDDEN, FFN), f"{i}.norm": (HIDDEN,)}
    shapes |= {"norm": (HIDDEN,), "head": (VOCAB, HIDDEN)}
    return {name: SentTensor(shape, 2) for name, shape in shapes.items()}, layers


def shard(name: str, shape: tuple[int, ...], tp_rank: int) -> TensorSlice:
    """Return the shard of a tensor: rows, or columns of o and down; norms are whole."""
    if len(shape) == 1:
        return TensorSlice(name, (0,), shape)
    axis = 1 if name.rpartition(".")[2] in ("o", "down") else 0
    size, offsets = list(shape), [0, 0]
    size[axis] //= TP
    offsets[axis] = tp_rank * size[axis]
    return TensorSlice(name, tuple(offsets), tuple(size))


def both_tables(tensors: dict[str, SentTensor], layers: int) -> tuple[RankSliceTable, RankSliceTable]:
    """Return the slices of the policy (TP2 x PP2) and of the engines (TP2) on all ranks."""
    held, wanted = [], []
    for rank in range(WORLD):
        stage = rank // TP
        names = [n for n in tensors if stage_of(n, layers) == stage]
        held.append(table_of_rank(tensors, [shard(n, tensors[n].shape, rank % TP) for n in names], rank))
        wanted.append(table_of_rank(tensors, [shard(n, t.shape, rank % TP) for n, t in tensors.items()], rank))
    return concatenate(held), concatenate(wanted)


def stage_of(name: str, layers: int) -> int:
    """Return the pipeline stage that holds a tensor."""
    layer = name.partition(".")[0]
    if layer.isdigit():
        return int(layer) * PP // layers
    return 0 if name == "embed" else PP - 1


class TimedSink:
    """The timed part of a `WeightSink`: it stores values inside its regions and drops all others."""

    def __init__(self, slices: Sequence[TensorSlice]) -> None:
        self.regions = {hf.name: (hf, torch.zeros(hf.shape, dtype=torch.bfloat16)) for hf in slices}

    def memory_of(self, hf: TensorSlice) -> Tensor | None:
        """Return the memory of `hf`, or None if it is not wholly inside a region."""
        region, memory = self.regions[hf.name]
        starts = [a - b for a, b in zip(hf.offsets, region.offsets, strict=True)]
        if any(a < 0 or a + n > m for a, n, m in zip(starts, hf.shape, region.shape, strict=True)):
            return None
        return memory[tuple(slice(a, a + n) for a, n in zip(starts, hf.shape, strict=True))]

    def write(self, hf: TensorSlice, values: Tensor) -> None:
        """Copy the overlap of `hf` and the region."""
        region, memory = self.regions[hf.name]
        ends = list(zip(hf.offsets, hf.shape, region.offsets, region.shape, strict=True))
        low = [max(a, b) for a, _, b, _ in ends]
        high = [min(a + n, b + m) for a, n, b, m in ends]
        if all(a < b for a, b in zip(low, high, strict=True)):
            there = tuple(slice(a - b, e - b) for a, e, b in zip(low, high, region.offsets, strict=True))
            here = tuple(slice(a - b, e - b) for a, e, b in zip(low, high, hf.offsets, strict=True))
            memory[there].copy_(values[here])


def on_rank(rank: int, store: str, megabytes: int, bucket_bytes: int, rounds: int) -> dict[str, Any]:
    """Run all measurements of one rank."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=300)
    )
    tensors, layers = model(megabytes)
    held, wanted = both_tables(tensors, layers)
    everything = concatenate(
        [table_of_rank(tensors, [whole(n, t) for n, t in tensors.items()], r) for r in range(WORLD)]
    )
    mine = held.rows_on([rank])
    slices = [
        as_slice(list(tensors), tensors, int(mine.tensors[i]), mine.starts[i], mine.ends[i]) for i in range(len(mine))
    ]
    shards = [HeldSlice(hf, tensors[hf.name].shape, torch.randn(hf.shape).bfloat16()) for hf in slices]
    sink = TimedSink([shard(n, t.shape, rank % TP) for n, t in tensors.items()])
    received = int(plan_reshard(tensors, held, wanted, [0] * WORLD, bucket_bytes).traffic.received_bytes()[rank])
    actions: dict[str, Callable[[], object]] = {}
    buffers: dict[str, int] = {}
    for kind in ("shared_memory", "gloo"):
        for name, ends in (("sync", wanted), ("gather", everything)):
            executor = connect(tensors, held, ends, bucket_bytes, kind, rank, sink)
            actions[f"{name} {kind}"] = checked_run(executor, shards)
            buffers[f"{name} {kind}"] = executor.buffer_bytes
    stored = sum(memory.nbytes for _, memory in sink.regions.values())
    source, target = torch.zeros(stored, dtype=torch.uint8), torch.ones(stored, dtype=torch.uint8)
    actions["memcpy"] = lambda: target[:received].copy_(source[:received])
    actions["memcpy of all"] = lambda: target.copy_(source)
    ours = [(held.view, held.hf) for held in shards] + [(memory, hf) for hf, memory in sink.regions.values()]
    actions["digest"] = lambda: [slice_digest(values, hf) for values, hf in ours]
    # words of 64 bits: a sum of narrower integers converts each of them first, which is slower than memory
    actions["read"] = lambda: [values.view(torch.int64).sum() for values, _ in ours]
    seconds, growth = measure(actions, rounds)
    wrong = [hf.name for hf, memory in sink.regions.values() if not bool(memory.any())]
    dist.destroy_process_group()
    return {"seconds": seconds, "growth": growth, "buffers": buffers, "received": received, "wrong": wrong}


def whole(name: str, tensor: SentTensor) -> TensorSlice:
    """Return the slice of the whole tensor."""
    return TensorSlice(name, (0,) * len(tensor.shape), tensor.shape)


def connect(
    tensors: dict[str, SentTensor],
    held: RankSliceTable,
    wanted: RankSliceTable,
    bucket_bytes: int,
    kind: TransportKind,
    rank: int,
    sink: TimedSink,
) -> ScheduleExecutor:
    """Return an executor as `WeightSync` makes it, without the exchange of layouts."""
    plan = plan_reshard(tensors, held, wanted, [0] * WORLD, bucket_bytes)
    schedule = schedule_of_rank(plan, rank, dict.fromkeys(tensors, torch.bfloat16), transport_kinds(kind))
    transports, buffer_bytes = make_transports(schedule.rounds, 300.0, job_peer_group())
    return ScheduleExecutor(schedule, transports, buffer_bytes, plan.hash, sink)  # type: ignore[arg-type]


def checked_run(executor: ScheduleExecutor, shards: Sequence[HeldSlice]) -> Callable[[], object]:
    """Return a function that runs one sync and asserts that nothing failed."""

    def run() -> None:
        faults = executor.run(shards, 1)
        assert not faults, faults

    return run


def measure(actions: dict[str, Callable[[], object]], rounds: int) -> tuple[dict[str, float], dict[str, int]]:
    """Return the least seconds of each action, and the growth of the process in bytes.

    All ranks run the same action at the same time.
    """
    best: dict[str, float] = {}
    growth: dict[str, int] = {}
    for number in range(rounds + 1):  # the first round only touches memory
        for name, action in actions.items():
            Path("/proc/self/clear_refs").write_text("5")
            before = resident("VmRSS")
            dist.barrier()
            start = time.perf_counter()
            action()
            dist.barrier()
            if number:
                best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)
            growth[name] = max(growth.get(name, 0), resident("VmHWM") - before)
    return best, growth


def resident(key: str) -> int:
    """Return the resident bytes of this process: present (VmRSS) or peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measurements(
    results: list[dict[str, Any]], megabytes: int, bucket_bytes: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """Yield one object per measured quantity."""
    seconds = {name: max(r["seconds"][name] for r in results) for name in results[0]["seconds"]}
    conditions = {
        "megabytes": megabytes,
        "rounds": rounds,
        "ranks": WORLD,
        "bucket_bytes": bucket_bytes,
        "received_bytes": max(r["received"] for r in results),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }

    def line(name: str, measured: float, reference: float, unit: str) -> dict[str, Any]:
        ratio = measured / reference if reference else 0.0
        return {
            "name": name,
            "measured": measured,
            "reference": reference,
            "ratio": ratio,
            "unit": unit,
            "conditions": conditions,
        }

    for kind in ("shared_memory", "gloo"):
        yield line(f"sync_{kind}_against_memcpy", seconds[f"sync {kind}"], seconds["memcpy"], "s")
        yield line(f"sync_{kind}_against_memcpy_of_all", seconds[f"sync {kind}"], seconds["memcpy of all"], "s")
        yield line(f"sync_{kind}_against_gathering", seconds[f"sync {kind}"], seconds[f"gather {kind}"], "s")
        most = max(r["growth"][f"sync {kind}"] for r in results)
        yield line(
            f"extra_memory_{kind}",
            max(most, max(r["buffers"][f"sync {kind}"] for r in results)),
            2 * bucket_bytes,
            "bytes",
        )
    yield line("digest_against_reading", seconds["digest"], seconds["read"], "s")


@errors_as_exit_codes()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1024, help="size of the model (default: %(default)s)")
    parser.add_argument("--bucket-megabytes", type=int, default=32, help="size of a bucket (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each method (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args(argv)
    for name in ("megabytes", "bucket_megabytes", "rounds"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}={getattr(args, name)} must be at least 1")
    os.environ["OMP_NUM_THREADS"] = "1"
    bucket_bytes = args.bucket_megabytes * 2**20
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(WORLD) as pool:
        work = [(rank, f"{folder}/store", args.megabytes, bucket_bytes, args.rounds) for rank in range(WORLD)]
        results = pool.starmap(on_rank, work, chunksize=1)
    if wrong := {name for result in results for name in result["wrong"]}:
        print(f"error: no values arrived in {sorted(wrong)[:3]}", file=sys.stderr)
        return 1
    found = list(measurements(results, args.megabytes, bucket_bytes, args.rounds))
    for each in found:
        measured, reference = f"{each['measured']:.4g} {each['unit']}", f"{each['reference']:.4g}"
        print(f"{each['name']}: {measured}, reference {reference}, ratio {each['ratio']:.3g}")
    if args.json:
        print(json.dumps(found[0] | {"all": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
