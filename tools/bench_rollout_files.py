"""Measure rollout files: bytes per token of all columns but the texts, and tokens per second that one core writes.

    python tools/bench_rollout_files.py [--rollouts 1024] [--tokens 4096] [--rounds 3] [--dir DIR] [--json]

A part of `--rollouts` rollouts with `--tokens` completion tokens each is written as in a run, with fsync, once per
round. Tokens have the frequencies of words (Zipf, exponent 1.3) over a vocabulary of 151,936; half of the log-probs
are those of nearly certain tokens, and all have full float32 precision; the eight rollouts of a group have the same
prompt of 256 tokens. The texts are empty. The rate counts tokens of prompts and completions per second of CPU time of
the process, which a busy machine does not change much, and per second of wall-clock time. It is measured with the
log-probs of the engine only, and with those of the policy too, which differ from them by about one percent.

Exit code 0: done; 1: more than 6 bytes per token, with the log-probs of the policy, or fewer than 20 million tokens per
second of CPU time, without them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from grpo_mega.observe.rollout_files.columns import RaggedColumn, RolloutColumns
from grpo_mega.observe.rollout_files.part_writer import part_path, write_part

VOCABULARY, GROUP, PROMPT_TOKENS = 151_936, 8, 256
MAX_BYTES, MIN_RATE = 6.0, 20e6


def log_probs(rng: np.random.Generator, count: int) -> npt.NDArray[np.float32]:
    """Return log-probs as an engine computes them: minus the logarithm of a float32 sum that is at least 1."""
    certain = 1 + rng.exponential(0.003, count)
    sums = np.where(rng.random(count) < 0.5, certain, np.exp(rng.exponential(0.5, count)))
    return -np.log(sums.astype(np.float32))


def make_columns(rollouts: int, tokens: int, seed: int = 0) -> RolloutColumns:
    """Return the columns of one part, with the log-probs of engine and policy."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(VOCABULARY).astype(np.int32)

    def draw(count: int) -> npt.NDArray[np.int32]:
        found: npt.NDArray[np.int32] = ids[np.minimum(rng.zipf(1.3, count), VOCABULARY) - 1]
        return found

    number = np.arange(rollouts, dtype=np.int32)
    offsets = np.arange(0, rollouts * tokens + 1, tokens, dtype=np.int64)
    prompts = np.repeat(draw(-(-rollouts // GROUP) * PROMPT_TOKENS).reshape(-1, PROMPT_TOKENS), GROUP, axis=0)
    sampler = log_probs(rng, rollouts * tokens)
    old = sampler + (rng.normal(0, 0.01, len(sampler)) * -sampler).astype(np.float32)
    same = np.zeros(rollouts, np.int32)
    return RolloutColumns(
        step=1,
        group=number // GROUP,
        member=number % GROUP,
        prompt_index=(number // GROUP).astype(np.int64),
        replica=same,
        policy_version=same,
        num_turns=same + 1,
        reward=rng.integers(0, 2, rollouts).astype(np.float64),
        advantage=rng.normal(size=rollouts),
        data_set=["train"] * rollouts,
        prompt=[""] * rollouts,
        completion=[""] * rollouts,
        answer=[""] * rollouts,
        stop_reason=["eos"] * rollouts,
        reward_components=[{"exact": 1.0}] * rollouts,
        reward_failures=[()] * rollouts,
        prompt_ids=RaggedColumn(
            prompts[:rollouts].reshape(-1), np.arange(0, rollouts * PROMPT_TOKENS + 1, PROMPT_TOKENS, dtype=np.int64)
        ),
        completion_ids=RaggedColumn(draw(rollouts * tokens), offsets),
        sampler_log_probs=RaggedColumn(sampler, offsets),
        old_log_probs=RaggedColumn(old, offsets),
    )


def measure(columns: RolloutColumns, folder: Path, rounds: int) -> dict[str, Any]:
    """Write the part `rounds` times; return medians, and the bytes per token of each column."""
    cpu, wall = [], []
    for _ in range(rounds):
        begin = (time.process_time(), time.monotonic())
        write_part(folder, 0, 1, columns)
        cpu.append(time.process_time() - begin[0])
        wall.append(time.monotonic() - begin[1])
    path = part_path(folder, 0)
    metadata = pq.ParquetFile(path).metadata
    by_column: dict[str, int] = {}
    for group in range(metadata.num_row_groups):
        for i in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(i)
            name = chunk.path_in_schema.partition(".")[0]
            by_column[name] = by_column.get(name, 0) + chunk.total_compressed_size
    tokens = columns.num_tokens
    return {
        "tokens": tokens,
        "bytes_per_token": path.stat().st_size / tokens,
        "tokens_per_cpu_second": tokens / statistics.median(cpu),
        "tokens_per_second": tokens / statistics.median(wall),
        "bytes_per_token_of": {name: size / tokens for name, size in by_column.items() if size / tokens >= 0.005},
    }


def lines_of(name: str, found: dict[str, Any]) -> list[str]:
    """Return the result as text."""
    parts = ", ".join(f"{column} {size:.2f}" for column, size in found["bytes_per_token_of"].items())
    return [
        f"{name}: {found['tokens']:,} tokens, {found['bytes_per_token']:.2f} bytes per token ({parts})",
        f"  {found['tokens_per_cpu_second'] / 1e6:.1f} M tokens per second of CPU time, "
        f"{found['tokens_per_second'] / 1e6:.1f} M per second",
    ]


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=1024, help="rollouts of the part (default 1024)")
    parser.add_argument("--tokens", type=int, default=4096, help="completion tokens of each (default 4096)")
    parser.add_argument("--rounds", type=int, default=3, help="writes, of which the median counts (default 3)")
    parser.add_argument("--dir", type=Path, help="file system to write to (default: that of temporary files)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    args = parser.parse_args()
    if args.rollouts < 1 or args.tokens < 1 or args.rounds < 1:
        print("error: --rollouts, --tokens and --rounds must be at least 1; correct them", file=sys.stderr)
        return 2
    columns = make_columns(args.rollouts, args.tokens)
    with tempfile.TemporaryDirectory(prefix="bench_rollout_files_", dir=args.dir) as work:
        engine = measure(replace(columns, old_log_probs=None), Path(work) / "engine", args.rounds)
        both = measure(columns, Path(work) / "both", args.rounds)
    print("\n".join([*lines_of("log-probs of the engine", engine), *lines_of("and of the policy", both)]))
    if args.json:
        rate = engine["tokens_per_cpu_second"]
        found = {"name": "rollout_files", "measured": rate, "reference": MIN_RATE, "ratio": rate / MIN_RATE}
        found |= {"unit": "tokens per second of CPU time", "conditions": f"{args.rollouts} x {args.tokens} tokens"}
        print(json.dumps(found | {"engine": engine, "engine_and_policy": both}))
    return int(both["bytes_per_token"] > MAX_BYTES or engine["tokens_per_cpu_second"] < MIN_RATE)


if __name__ == "__main__":
    sys.exit(main())
