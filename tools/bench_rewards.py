"""Measure rewards: GSM8K gradings per second, sandboxed programs per minute, and the effect of hostile programs.

    python tools/bench_rewards.py                                  # all three
    python tools/bench_rewards.py --measure gradings --data test.jsonl
    python tools/bench_rewards.py --measure labels --labels example_model_solutions.jsonl

gradings: the rate of one worker as in a run, with submit, the socket and collect, next to the same function in a loop
of this process (`reference`). programs: the rate of right answers of reward `code`, one sandbox per program, on
`--workers` processes. hostile: each hostile program runs alone. It must end within its limit and the start of the
sandbox, and the same worker must score a right program correctly after it. labels: the agreement with the labels that
the authors of GSM8K published for answers of their models. Exit code 1: a target is missed.

Each rate is also given per second of CPU time, children included, because wall-clock rates depend on other programs of
the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

from grpo_mega.cli.exit_codes import errors_as_exit_codes
from grpo_mega.config.rollout_sections import RewardTerm
from grpo_mega.rewards.builtin.gsm8k import gsm8k
from grpo_mega.rewards.pool import RewardPool
from grpo_mega.types import UserError

GRADINGS_PER_SECOND = 2000
PROGRAMS_PER_MINUTE = 200
AGREEMENT = 0.999
START_SECONDS = 3.0  # in addition to its limit: start and end of the sandbox
MEASURES = ("gradings", "programs", "hostile", "labels")

PROGRAM = """Reading the number first:

```python
def square(number):
    return number * number


print(square(int(input())))
```
"""
TESTS = '{"inputs": ["12"], "outputs": ["144"]}'
HOSTILE = {
    "endless loop": "while True: pass",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "10 GB string": "print(len('a' * 10**10))",
    "9**9**9": "print(9**9**9)",
    "catastrophic regular expression": "import re\nprint(re.match('(a+)+b', 'a' * 100))",
    "file access": "print(open('/etc/passwd').read())\nopen('/tmp/mine', 'w').write('x')",
    "network access": "import socket\nsocket.create_connection(('127.0.0.1', 22))",
    "output flood": "while True: print('x' * 10**6)",
    "memory of processes": "import os\nos.fork()\nos.fork()\nx = b'x' * 10**7\nwhile True: x += x",
    "full disk": "f = open('big', 'wb')\nwhile True: f.write(bytes(10**6))",
    "killing the parent": "import os\nos.killpg(0, 9)\nos.kill(os.getppid(), 9)\nos.kill(-1, 9)",
    "a detached process": "import os\nif not os.fork():\n os.setsid()\n if not os.fork():\n  while True: pass",
}


def completions(path: Path | None, number: int) -> list[tuple[str, str]]:
    """Return (completion, reference) pairs, alternately marked, boxed and in prose.

    The solutions are those of the GSM8K file, or generated without a file.
    """
    if path is not None:
        references = [row["answer"] for row in rows_of(path)]
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


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}", remedy="give a JSONL file") from error


def children_seconds() -> float:
    """Return the CPU time in seconds of all child processes that have exited, and of their children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure_gradings(path: Path | None, number: int) -> dict[str, Any]:
    """Measure gradings per second of one worker, and in this process."""
    pairs = completions(path, number)
    started = time.perf_counter()
    num_right = sum(gsm8k("", completion, reference) for completion, reference in pairs)
    in_process = number / (time.perf_counter() - started)
    children = children_seconds()
    with RewardPool([RewardTerm(name="gsm8k")], workers=1, timeout_seconds=600.0) as pool:
        started, started_cpu = time.perf_counter(), time.process_time()
        for key, (completion, reference) in enumerate(pairs):
            pool.submit(key, "a question of usual length " * 8, completion, reference)
        rewards = pool.collect()
        pooled = number / (time.perf_counter() - started)
        caller = (time.process_time() - started_cpu) / number
    assert sum(item.value or 0.0 for item in rewards.values()) == num_right == number
    return {
        "measured": pooled,
        "reference": in_process,
        "ratio": pooled / in_process,
        "per_processor_second": number / (children_seconds() - children),
        "target": GRADINGS_PER_SECOND,
        "met": pooled >= GRADINGS_PER_SECOND,
        "unit": "gradings per second of one worker",
        "gradings": number,
        "data": "gsm8k" if path else "generated",
        "caller_seconds_per_grading": caller,
    }


def measure_programs(number: int, workers: int) -> dict[str, Any]:
    """Measure right programs per minute, one sandbox per program."""
    children = children_seconds()
    with RewardPool([RewardTerm(name="code")], workers=workers, timeout_seconds=30.0) as pool:
        started = time.perf_counter()
        for key in range(number):
            pool.submit(key, "", PROGRAM, TESTS)
        rewards = pool.collect()
        per_minute = 60.0 * number / (time.perf_counter() - started)
    num_right = sum(item.value or 0.0 for item in rewards.values())
    return {
        "measured": per_minute,
        "processor_seconds_per_program": (children_seconds() - children) / number,
        "target": PROGRAMS_PER_MINUTE,
        "met": per_minute >= PROGRAMS_PER_MINUTE and num_right == number,
        "unit": f"programs per minute of {workers} workers",
        "programs": number,
        "right": num_right,
    }


def measure_hostile(limit_seconds: float) -> dict[str, Any]:
    """Measure the seconds of each hostile program, and check that the next right program is scored correctly."""
    seconds, harmed = {}, []
    terms = [RewardTerm(name="code", args={"seconds": limit_seconds})]
    with RewardPool(terms, workers=1, timeout_seconds=10 * limit_seconds) as pool:
        workers = pool.worker_pids
        for name, program in HOSTILE.items():
            started = time.perf_counter()
            pool.submit(0, "", f"```python\n{program}\n```", TESTS)
            hostile = pool.collect()[0]
            seconds[name] = round(time.perf_counter() - started, 2)
            pool.submit(1, "", PROGRAM, TESTS)
            honest = pool.collect()[1]
            if hostile.value or hostile.failures or honest.value != 1.0 or pool.worker_pids != workers:
                harmed.append(name)
    slowest = max(seconds.values())
    return {
        "measured": slowest,
        "target": limit_seconds + START_SECONDS,
        "met": slowest <= limit_seconds + START_SECONDS and not harmed,
        "unit": f"seconds of the slowest hostile program, whose limit is {limit_seconds:g}",
        "seconds": seconds,
        "harmed": harmed,
    }


def measure_labels(path: Path) -> dict[str, Any]:
    """Measure the agreement with labels in rows of {ground_truth, MODEL: {solution, is_correct}}."""
    total, different = 0, []
    for row in rows_of(path):
        reference = row["ground_truth"].rpartition("A:")[2].strip()
        for model, answer in row.items():
            if not isinstance(answer, dict):
                continue
            total += 1
            if bool(gsm8k("", answer["solution"], reference)) != bool(answer["is_correct"]):
                different.append({"model": model, "end": answer["solution"][-80:], "reference": reference})
    if not total:
        raise UserError(
            f"{path}: no row contains answers with solution and is_correct", remedy="give example_model_solutions.jsonl"
        )
    agreement = 1 - len(different) / total
    return {
        "measured": agreement,
        "target": AGREEMENT,
        "met": agreement >= AGREEMENT,
        "unit": "share of answers graded as labeled",
        "answers": total,
        "different": different[:20],
    }


def measured(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one of MEASURES with the arguments of the command line."""
    if name == "gradings":
        return measure_gradings(args.data, args.gradings)
    if name == "programs":
        return measure_programs(args.programs, args.workers)
    if name == "hostile":
        return measure_hostile(args.limit_seconds)
    if args.labels is None:
        raise UserError("--measure labels needs --labels", remedy="give a file of labeled answers")
    return measure_labels(args.labels)


@errors_as_exit_codes()
def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=MEASURES, action="append", help="default: gradings, programs, hostile")
    parser.add_argument(
        "--data", type=Path, help="gradings: a GSM8K file; default: generated solutions of the same length"
    )
    parser.add_argument("--gradings", type=int, default=20000, help="gradings: how many (default: %(default)s)")
    parser.add_argument("--programs", type=int, default=200, help="programs: how many (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="programs: processes")
    parser.add_argument("--limit-seconds", type=float, default=2.0, help="hostile: the limit of each program")
    parser.add_argument("--labels", type=Path, help="labels: example_model_solutions.jsonl of grade-school-math")
    parser.add_argument("--json", action="store_true", help="no effect: the last line is always JSON")
    args = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for name in args.measure or ["gradings", "programs", "hostile"]:
        results[name] = measured(name, args)
    first = next(iter(results.values()))
    conditions = {
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "kernel": platform.release(),
    }
    summary = {key: first.get(key) for key in ("measured", "reference", "ratio", "unit")}
    print(json.dumps({"name": "rewards"} | summary | {"conditions": conditions, "results": results}))
    return 0 if all(result["met"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
