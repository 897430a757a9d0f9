r"""Measure the host work of one rank between the last sampled token and the first kernel of the training.

    python tools/bench_host.py [--ranks 8 64 512] [--rollouts-per-rank 256] [--tokens 4096] [--json]
    python tools/bench_host.py --step [--json]

One data-parallel rank of a job is real; what the other ranks would send is prepared before the clock starts: their
rows of the table, and the rollouts that this rank trains and they sampled. Measured are the columns of this rank's
share, the table, token weights, the plan of all ranks, packing and unpacking of the transfers, advantages and
microbatches; then, after the training, the comparison of log-probs and the metrics of rank 0. The time on the network
is not measured. Each case runs in a process of its own with one thread.

A share is the columns of the rollouts that a rank samples, in bytes; it is the same in every job. `resident` is the
growth of the process by the work, at its peak, over the bytes of a share. It contains the numbers that every rank has
of each rollout of the step: the table, the plan and the token weights, about 90 bytes per rollout. They grow with the
number of ranks, and with 512 ranks they are nearly as large as a share; "without" is the growth minus their bytes. Rank
0 of each job is compared with its last rank, and the cases with each other.

`--step` measures a step of 2,048 rollouts and 3.7 million tokens on one rank: all host work of it that the training
waits for, with the metrics of tokens and texts and the columns of the rollout file; and apart from it the file, which
is written in the background. One character in four is a space, and a token has four characters.

Exit code 0: done; 1: with 64 ranks the work takes more than 1.5 s of CPU time, its memory is more than 3 times that of
the share, or rank 0 takes more than 1.2 times as long as the last rank; with `--step`, the training waits for more than
1 s of CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from grpo_mega.config.algorithm_section import AlgorithmConfig
from grpo_mega.config.schema import TrainConfig
from grpo_mega.data.rollout_table import SCALARS
from grpo_mega.data.rollout_tokens import RolloutTokens
from grpo_mega.data.row_plan import RolloutCost, RowShape, plan_step, split_minibatches
from grpo_mega.observe.memory import device_peak
from grpo_mega.observe.rollout_files.part_writer import write_part
from grpo_mega.parallel.array_collectives import ArrayCollectives
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.parallel.topology import Topology
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.trainer.batch import TrainBatch, build_batch
from grpo_mega.trainer.mismatch import ComparedTokens, Differences
from grpo_mega.trainer.mismatch_guard import MismatchGuard
from grpo_mega.trainer.objective import Objective
from grpo_mega.trainer.rollout_parts import shard_columns
from grpo_mega.trainer.rollout_transfer import RolloutTransfer
from grpo_mega.trainer.step_metrics import StepResult
from grpo_mega.trainer.token_metrics import token_metrics
from grpo_mega.types import Completion, Prompt, Reward, Rollout, UpdateStats
from grpo_mega.weight_sync.sync import SyncReport

GROUP, PROMPT_TOKENS, MINIBATCHES, VOCABULARY = 16, 64, 8, 151_936
MAX_SECONDS, MAX_RANK_0, MAX_RESIDENT = 1.5, 1.2, 3.0
STEP_ROLLOUTS, STEP_TOKENS, MAX_STEP_SECONDS = 2048, 1744, 1.0
COST = RolloutCost(linear=1.0, quadratic=1e-5)


class PreparedCollectives(ArrayCollectives):
    """Collectives of one rank of a job; what the others send is prepared."""

    def __init__(self, ranks: Ranks, table: NDArray[np.float64]) -> None:
        self.ranks, self.world_size = ranks, ranks.topology.world_size
        self._replica_group = None
        self._table = table
        self.arrivals: list[NDArray[Any]] = []
        self._num_arrived = self._num_summed = 0

    def sum(self, array: NDArray[np.float64]) -> NDArray[np.float64]:
        if self._num_summed == len(self._table):
            return array
        begin, self._num_summed = self._num_summed, self._num_summed + len(array)
        return array + self._table[begin : self._num_summed]  # the next rows of the table

    def _all_to_all(self, sent: torch.Tensor, sizes: list[int], received_sizes: list[int]) -> torch.Tensor:
        received = torch.from_numpy(self.arrivals[self._num_arrived].view(np.uint8)).clone()
        self._num_arrived += 1  # its memory is kept: a discount of the prepared bytes would hide others
        assert len(received) == sum(received_sizes), "the prepared bytes are those of the plan"
        return received


@dataclass(frozen=True)
class RankInputs:
    """Inputs of one rank, which a run would have when the last token is sampled."""

    prompts: list[Prompt]
    own: dict[int, Rollout]
    collectives: PreparedCollectives
    train: TrainConfig


def prepare(num_ranks: int, rank: int, per_rank: int, mean_tokens: int) -> RankInputs:
    """Return the inputs; lengths are uniform from a quarter to seven quarters of the mean."""
    rng = np.random.default_rng(0)
    size = num_ranks * per_rank
    lengths = rng.integers(mean_tokens // 4, mean_tokens * 7 // 4, size)
    rewards = rng.integers(0, 2, size).astype(np.float64)
    prompts = [Prompt(i, "", tuple(range(PROMPT_TOKENS)), "") for i in range(size // GROUP)]
    share = np.repeat(np.arange(size // GROUP) % num_ranks, GROUP)
    table = np.zeros((size, len(SCALARS) + 1))
    values: dict[str, NDArray[Any] | int] = {
        **{"count": 1, "num_turns": 1, "num_steps": -1, "replica": share, "prompt_shard": share},
        **{"completion_tokens": lengths, "loss_tokens": lengths, "reward": rewards},
    }
    for name, column in values.items():
        table[:, list(SCALARS).index(name)] = column
    table[:, -1] = rewards
    table[share == rank] = 0
    own = {
        int(i): Rollout(
            prompts[i // GROUP], _completion(rng, int(lengths[i])), Reward(rewards[i], {"r": rewards[i]}), 0
        )
        for i in np.flatnonzero(share == rank)
    }
    topology = Topology(num_ranks)
    collectives = PreparedCollectives(Ranks(topology, topology.coordinates(rank), torch.device("cpu")), table)
    train = TrainConfig(steps=1, minibatches_per_epoch=MINIBATCHES, max_tokens_per_microbatch=8 * mean_tokens)
    if num_ranks > 1:
        collectives.arrivals = _arrivals(lengths, share, rank, num_ranks, train)
    return RankInputs(prompts, own, collectives, train)


def _completion(rng: np.random.Generator, count: int) -> Completion:
    log_probs = -rng.exponential(0.5, count).astype(np.float32)
    return Completion(rng.integers(0, VOCABULARY, count, dtype=np.int32), log_probs, "eos", 0, "")


def _arrivals(
    lengths: NDArray[np.int64], share: NDArray[np.int64], rank: int, num_ranks: int, train: TrainConfig
) -> list[NDArray[Any]]:
    """Return the columns that this rank receives, in the order in which they arrive."""
    spans = [range(s.start * GROUP, s.stop * GROUP) for s in split_minibatches(len(lengths) // GROUP, MINIBATCHES)]
    plan = plan_step(
        lengths + PROMPT_TOKENS,
        spans,
        max_tokens=train.max_tokens_per_microbatch,
        dp=num_ranks,
        shape=RowShape(),
        cost=COST,
    )
    wanted = np.flatnonzero(plan.trainer == rank)
    wanted = wanted[np.argsort(share[wanted], kind="stable")]
    rng = np.random.default_rng(1)
    prompt = Prompt(0, "", tuple(range(PROMPT_TOKENS)), "")
    rollouts = [Rollout(prompt, _completion(rng, int(lengths[i])), Reward(0.0), 0) for i in wanted]
    tokens = RolloutTokens.of(list(enumerate(rollouts)))
    return [tokens.token_ids, tokens.sampler_log_probs, tokens.loss_mask, tokens.policy_versions]


def sample(case: RankInputs) -> SampledGroups:
    """Build the columns and the table."""
    share = case.collectives.ranks.at.prompt_shard
    return SampledGroups.gather(
        case.prompts, GROUP, case.own, prompt_shard=share, component_names=["r"], sum_over_ranks=case.collectives.sum
    )


def build(case: RankInputs, groups: SampledGroups) -> TrainBatch:
    """Build the microbatches."""
    transfer, objective = RolloutTransfer(case.collectives), Objective(AlgorithmConfig(), 1)
    return build_batch(
        groups, groups.table.reward, case.train, objective, transfer=transfer, shape=RowShape(), cost=COST
    )


def report(groups: SampledGroups, batch: TrainBatch) -> dict[str, float]:
    """Compare the log-probs of this rank's rollouts, and compute the metrics that rank 0 writes."""
    old = groups.tokens.on_loss_tokens(groups.tokens.sampler_log_probs)
    sums = Differences.of(groups.tokens, old).sums()
    updates = [UpdateStats(1.0, 1e-6, {"loss": 0.0, "entropy": 0.0}, {})]
    sync = SyncReport(seconds=1.0, verify_seconds=0.0, written_bytes=0, received_bytes=0, policy_digest="")
    found = {"train/mismatch_max": float(sums[0])}
    result = StepResult(1, groups, batch, old, np.zeros(len(groups.table)), updates, sync, 0.0, found)
    return result.metrics(1, lambda table: table.reward == 1)


def measure(num_ranks: int, rank: int, per_rank: int, mean_tokens: int) -> dict[str, Any]:
    """Measure one rank in this process."""
    torch.set_num_threads(1)
    warm = prepare(1, 0, GROUP * MINIBATCHES, 64)
    warm_groups = sample(warm)
    report(warm_groups, build(warm, warm_groups))
    case, take_peak = prepare(num_ranks, rank, per_rank, mean_tokens), device_peak("cpu")
    take_peak()  # returns freed memory to the system, so that it hides no growth
    before, clock, wall = _resident_bytes(), time.process_time(), time.perf_counter()
    groups = sample(case)
    sampled = time.process_time()
    batch = build(case, groups)
    planned = time.process_time()
    padded = sum(len(row.token_ids) for row in batch.microbatches)  # packs one row after the other
    built, wall = time.process_time(), time.perf_counter() - wall
    peak = take_peak() - before
    plan, rows = batch.plan, batch.microbatches
    of_all = (plan.minibatch, plan.trainer, plan.row, plan.lengths, rows.token_weights, batch.is_trained)
    of_all_bytes = groups.table.nbytes + sum(column.nbytes for column in of_all)
    metrics = report(groups, batch)
    return {
        "ranks": num_ranks,
        "rank": rank,
        "rollouts": len(groups.table),
        "tokens": int(groups.table.num_tokens.sum()),
        "share_tokens": len(groups.tokens.token_ids),
        "cpu_seconds": built - clock,
        "wall_seconds": wall,
        "columns_seconds": sampled - clock,
        "batch_seconds": planned - sampled,
        "rows_seconds": built - planned,
        "row_tokens": padded,
        "report_seconds": time.process_time() - built,
        "share_bytes": groups.tokens.nbytes,
        "all_rollouts_bytes": of_all_bytes,
        "resident_over_share": peak / groups.tokens.nbytes,
        "own_resident_over_share": (peak - of_all_bytes) / groups.tokens.nbytes,
        "padding_fraction": metrics["train/padding_fraction"],
        "imbalance": metrics["train/imbalance"],
    }


def measure_step() -> dict[str, Any]:
    """Measure the host work of a step on one rank in this process."""
    torch.set_num_threads(1)
    warm = prepare(1, 0, GROUP * MINIBATCHES, 64)
    report(sample(warm), build(warm, sample(warm)))
    case = prepare(1, 0, STEP_ROLLOUTS, STEP_TOKENS)
    seconds, clock = dict[str, float](), time.process_time()

    def done(name: str) -> None:
        nonlocal clock
        seconds[name] = time.process_time() - clock
        clock = time.process_time()

    groups = sample(case)
    groups = replace(groups, texts=["abc " * int(n) for n in groups.table.completion_tokens])
    done("columns and table")
    batch = build(case, groups)
    done("plan, advantages")
    row_tokens = sum(len(row.token_ids) for row in batch.microbatches)
    done("rows")
    transfer = RolloutTransfer(case.collectives)
    old = groups.tokens.on_loss_tokens(groups.tokens.sampler_log_probs + np.float32(1e-3))
    differences = Differences.of(groups.tokens, old)
    MismatchGuard(0.5, "bench").check(1, ComparedTokens(differences, groups.table), case.collectives.gather, "")
    done("mismatch")
    of_tokens = token_metrics(differences, groups, batch, transfer)
    done("metrics of tokens and texts")
    columns = shard_columns(1, groups, np.zeros(len(groups.table)), old)
    done("columns of the file")
    updates = [UpdateStats(1.0, 1e-6, {"loss": 0.0, "entropy": 0.0}, {})]
    sync = SyncReport(seconds=1.0, verify_seconds=0.0, written_bytes=0, received_bytes=0, policy_digest="")
    result = StepResult(1, groups, batch, old, np.zeros(len(groups.table)), updates, sync, 0.0, of_tokens)
    result.metrics(1, lambda table: table.reward == 1)
    done("metrics of rollouts")
    waited = sum(seconds.values())
    with tempfile.TemporaryDirectory(prefix="bench_host_") as folder:
        write_part(Path(folder), 0, 1, columns)
    return {
        "rollouts": len(groups.table),
        "tokens": int(groups.table.num_tokens.sum()),
        "row_tokens": row_tokens,
        "cpu_seconds": waited,
        "parts": seconds,
        "background_seconds": time.process_time() - clock,
    }


def print_step(as_json: bool) -> int:
    """Measure the step and print it; return the exit code."""
    found = measure_step()
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in found["parts"].items())
    print(
        f"{found['rollouts']:,} rollouts, {found['tokens'] / 1e6:.1f} M tokens: {found['cpu_seconds']:.2f} s of CPU "
        f"time that the training waits for ({parts}); rollout file in the background {found['background_seconds']:.2f}"
    )
    if as_json:
        limit = MAX_STEP_SECONDS
        result = {"name": "host_step", "measured": found["cpu_seconds"], "reference": limit}
        result |= {"ratio": found["cpu_seconds"] / limit, "unit": "seconds of CPU time"}
        conditions = f"{found['rollouts']} rollouts, {found['tokens']} tokens, one rank"
        print(json.dumps(result | {"conditions": conditions} | found))
    return int(found["cpu_seconds"] > MAX_STEP_SECONDS)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run_case(args: argparse.Namespace, num_ranks: int, rank: int) -> dict[str, Any]:
    """Measure one rank in a process of its own."""
    command = [sys.executable, __file__, "--case", f"{num_ranks}", f"{rank}"]
    command += ["--rollouts-per-rank", f"{args.rollouts_per_rank}", "--tokens", f"{args.tokens}"]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def line_of(found: dict[str, Any]) -> str:
    """Return the result of one rank as text."""
    return (
        f"{found['ranks']:4} ranks, rank {found['rank']:3}: {found['tokens'] / 1e6:.0f} M tokens of the step, "
        f"{found['share_tokens'] / 1e6:.2f} M of the share; {found['cpu_seconds']:.2f} s of CPU time "
        f"(columns and table {found['columns_seconds']:.2f}, plan and batch {found['batch_seconds']:.2f}, rows "
        f"{found['rows_seconds']:.2f}), afterwards "
        f"{found['report_seconds']:.2f} s; resident {found['resident_over_share']:.2f} x share, without "
        f"{found['all_rollouts_bytes'] / 1e6:.1f} MB of all rollouts {found['own_resident_over_share']:.2f}; "
        f"padding {found['padding_fraction']:.3f}, imbalance {found['imbalance']:.3f}"
    )


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512], help="data-parallel ranks of the jobs")
    parser.add_argument("--rollouts-per-rank", type=int, default=256, help="sampled by each rank (default 256)")
    parser.add_argument("--tokens", type=int, default=4096, help="mean completion length (default 4096)")
    parser.add_argument("--step", action="store_true", help="measure a step of 2,048 rollouts on one rank")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--case", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if (
        args.rollouts_per_rank < 1
        or args.rollouts_per_rank * min(args.ranks) % (GROUP * MINIBATCHES)
        or args.tokens < 8
    ):
        print(
            f"error: --rollouts-per-rank={args.rollouts_per_rank} times --ranks must be a multiple of "
            f"{GROUP * MINIBATCHES}, and --tokens={args.tokens} at least 8; correct them",
            file=sys.stderr,
        )
        return 2
    if args.step:
        return print_step(args.json)
    if args.case:
        ranks, rank = args.case
        print(json.dumps(measure(ranks, rank, args.rollouts_per_rank, args.tokens)))
        return 0
    cases = [run_case(args, ranks, rank) for ranks in args.ranks for rank in (0, ranks - 1)]
    for found in cases:
        print(line_of(found))
    middle = [found for found in cases if found["ranks"] == (64 if 64 in args.ranks else args.ranks[-1])]
    seconds, ratio = max(c["cpu_seconds"] for c in middle), middle[0]["cpu_seconds"] / middle[1]["cpu_seconds"]
    if args.json:
        result = {"name": "host", "measured": seconds, "reference": MAX_SECONDS, "ratio": seconds / MAX_SECONDS}
        result |= {
            "unit": "seconds of CPU time",
            "conditions": f"{middle[0]['rollouts']} rollouts, {middle[0]['ranks']} ranks",
        }
        print(json.dumps(result | {"rank_0_over_last": ratio, "cases": cases}))
    resident = max(c["resident_over_share"] for c in middle)
    return int(seconds > MAX_SECONDS or ratio > MAX_RANK_0 or resident > MAX_RESIDENT)


if __name__ == "__main__":
    sys.exit(main())
