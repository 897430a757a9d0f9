"""GSM8K gradings per second of one reward process, next to the same function called in a loop in this process.

`measured` is what a run gets from one worker, all costs included: submit, both ways through the socket, collect.
`reference` is the grading alone. `caller_seconds_per_grading` is what the training process pays for each.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from grpo_mega.config.schema import RewardTerm
from grpo_mega.rewards.gsm8k import gsm8k
from grpo_mega.rewards.pool import RewardPool

TARGET_PER_SECOND = 2000


def completions(path: Path | None, number: int) -> list[tuple[str, str]]:
    """(completion, reference) pairs: GSM8K's own solutions, else made-up ones; marked, boxed and in prose by turns."""
    if path is not None:
        with path.open(encoding="utf-8") as lines:
            references = [json.loads(line)["answer"] for line in lines]
    else:
        step = "She buys 3 boxes of 12 eggs, so she has 3 * 12 = <<3*12=36>>36 eggs.\n"
        references = [step * (2 + i % 5) + f"#### {36 + i:,}" for i in range(1000)]
    styles = ("#### {}", "The answer is $\\boxed{{{}}}$.", "So in the end there are {} of them.")
    pairs = []
    for index in range(number):
        reference = references[index % len(references)]
        solution, _, answer = reference.partition("####")
        pairs.append((solution + styles[index % len(styles)].format(answer.strip()), reference))
    return pairs


def main() -> int:
    """Prints one JSON line; exit code 1 when the worker is slower than the target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a GSM8K file; without it, made-up solutions of the same length")
    parser.add_argument("--gradings", type=int, default=20000)
    parser.add_argument("--json", action="store_true", help="accepted for uniformity: the last line is always JSON")
    args = parser.parse_args()
    pairs = completions(args.data, args.gradings)

    started = time.perf_counter()
    num_right = sum(gsm8k("", completion, reference) for completion, reference in pairs)
    in_process = args.gradings / (time.perf_counter() - started)

    with RewardPool([RewardTerm(name="gsm8k")], workers=1, timeout_seconds=5.0) as pool:
        started, started_cpu = time.perf_counter(), time.process_time()
        for key, (completion, reference) in enumerate(pairs):
            pool.submit(key, "a question of usual length " * 8, completion, reference)
        rewards = pool.collect()
        pooled = args.gradings / (time.perf_counter() - started)
        caller = (time.process_time() - started_cpu) / args.gradings
    assert sum(item.value for item in rewards.values()) == num_right == args.gradings
    conditions = {
        "gradings": args.gradings,
        "workers": 1,
        "cores": os.cpu_count(),
        "data": "gsm8k" if args.data else "made up",
        "caller_seconds_per_grading": caller,
        "target": TARGET_PER_SECOND,
    }
    result = {"name": "reward_gradings", "measured": pooled, "reference": in_process, "ratio": pooled / in_process}
    print(json.dumps(result | {"unit": "gradings per second per worker", "conditions": conditions}))
    return 0 if pooled >= TARGET_PER_SECOND else 1


if __name__ == "__main__":
    sys.exit(main())
