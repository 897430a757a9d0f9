"""Score a file of completions with any reward: print each row of {prompt, completion, answer} with `reward` added.

    grpo-mega score --reward gsm8k --args '{"strict": true}' completions.jsonl > scored.jsonl
    python tools/score.py --reward gsm8k --args '{"strict": true}' completions.jsonl > scored.jsonl

The file may also be a folder `rollouts/step_NNNNNN` of a run, or one of its Parquet parts.

Rows keep their order and their other keys. The rows are scored by the same worker processes as in a run, with the same
time limit. A row that could not be scored gets the lowest value of the reward, or null (--on-failure), and is counted.

A reward gets the same inputs as in a run. The prompt may be a list of messages; a text is one message of the user,
unless there is a key `messages`. `completion_with_special_tokens` and `dataset` are read from keys of these names, if
the row has them, and every other key is one of the row's `fields`.

Exit code 0: done; 2: the input is wrong.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from grpo_mega.cli.closed_pipe import allow_closed_pipe
from grpo_mega.cli.exit_codes import errors_as_exit_codes
from grpo_mega.config.option_parser import OptionParser
from grpo_mega.config.rollout_sections import RewardTerm
from grpo_mega.config.user_code import absolute_name
from grpo_mega.observe.atomic_files import to_json
from grpo_mega.rewards.inputs import ScoringRow
from grpo_mega.rewards.pool import RewardPool
from grpo_mega.types import UserError

ROWS_AT_A_TIME = 2000
_INPUT_KEYS = frozenset(
    ("prompt", "completion", "answer", "messages", "completion_with_special_tokens", "dataset", "data_set")
)


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSONL file, whose empty lines are skipped, or of the rollouts of a step of a run.

    Raises:
        UserError: a line is not a JSON object or lacks a key (names file and line), or a file cannot be read.
    """
    if path.is_dir() or path.suffix == ".parquet":
        from grpo_mega.observe.rollout_files.reader import read_rows

        yield from read_rows(path)
        return
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield parse_row(f"{path}:{number}", line)
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}", remedy="give a JSONL file of {prompt, completion, answer}"
        ) from error


def parse_row(where: str, line: bytes) -> dict[str, Any]:
    """Parse and check one row; an answer may also be a JSON number.

    Raises:
        UserError: the row is malformed; names `where`.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: {line.strip()[:60]!r} is not JSON ({error})", remedy="write one object per line"
        ) from error
    if not isinstance(row, dict):
        raise UserError(
            f"{where}: a row must be an object with prompt, completion and answer, got {type(row).__name__}"
        )
    for key in ("prompt", "completion", "answer"):
        if key not in row:
            raise UserError(f"{where}: {key!r} is missing; the row has {', '.join(row) or 'no keys'}", remedy="add it")
        if key == "prompt" and _are_messages(row[key]):
            continue
        is_number = key == "answer" and isinstance(row[key], int | float) and not isinstance(row[key], bool)
        if not isinstance(row[key], str) and not is_number:
            raise UserError(f"{where}: {key}={json.dumps(row[key])[:60]} must be a string", remedy="write one")
    for key in ("completion_with_special_tokens", "dataset", "data_set"):
        if not isinstance(row.get(key, ""), str):
            raise UserError(f"{where}: {key}={json.dumps(row[key])[:60]} must be a string", remedy="write one")
    if "messages" in row and not _are_messages(row["messages"]):
        raise UserError(
            f"{where}: messages={json.dumps(row['messages'])[:60]} must be a list of {{role, content}}",
            remedy="correct it, or remove it",
        )
    return row


def _are_messages(prompt: object) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
        )
    )


def scoring_row(row: dict[str, Any], index: int) -> ScoringRow:
    """Return what a reward gets for a checked row of the file; `index` is the position of the row."""
    prompt, answer = row["prompt"], row["answer"]
    return ScoringRow(
        prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt),
        row["completion"],
        answer if isinstance(answer, str) else json.dumps(answer),
        messages=row.get("messages", () if isinstance(prompt, str) else prompt),
        completion_with_special_tokens=row.get("completion_with_special_tokens"),
        fields={key: value for key, value in row.items() if key not in _INPUT_KEYS},
        dataset=row.get("dataset", row.get("data_set", "")),
        index=index,
    )


def score(args: argparse.Namespace) -> dict[str, Any]:
    """Write the scored rows to stdout; return the summary."""
    try:
        reward_args = json.loads(args.args)
    except ValueError as error:
        raise UserError(
            f"--args={args.args} must be a JSON object ({error})", remedy="write for example '{}'"
        ) from error
    if not isinstance(reward_args, dict):
        raise UserError(f"--args={args.args} must be a JSON object", remedy="write for example '{\"strict\": true}'")
    if not 0 < args.timeout_seconds < math.inf or args.workers < 1:
        raise UserError(
            f"--timeout-seconds={args.timeout_seconds} --workers={args.workers}: both must be positive and finite",
            remedy="correct them, or use the defaults",
        )
    term = RewardTerm(name=absolute_name("--reward", args.reward, [Path.cwd()]), args=reward_args)
    num_rows, values, failures = 0, list[float](), 0
    with RewardPool(
        [term], workers=args.workers, timeout_seconds=args.timeout_seconds, on_failure=args.on_failure
    ) as pool:
        rows = rows_of(args.file)
        while batch := list(islice(rows, ROWS_AT_A_TIME)):
            for key, row in enumerate(batch):
                pool.submit_row(key, scoring_row(row, num_rows + key))
            rewards = pool.collect()
            for key, row in enumerate(batch):
                value = rewards[key].value
                print(to_json(row | {"reward": value}))
                values += [] if value is None else [value]
                failures += bool(rewards[key].failures)
            num_rows += len(batch)
    mean = sum(values) / len(values) if values else None
    return {"reward_name": args.reward, "num_rows": num_rows, "reward_mean": mean, "num_failures": failures}


@errors_as_exit_codes()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSONL file of {prompt, completion, answer}, or rollouts of a run")
    parser.add_argument(
        "--reward", required=True, help="a name of docs/rewards.md, ./file.py:function or package.module:function"
    )
    parser.add_argument("--args", default="{}", help="arguments of the reward, as a JSON object (default: none)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--timeout-seconds", type=float, default=5.0, help="time limit of one row (default: 5)")
    parser.add_argument(
        "--on-failure", choices=("floor", "drop"), help="as reward.on_failure of a run (default: by the reward)"
    )
    parser.add_argument("--json", action="store_true", help="print a summary as one JSON object on the last line")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    with allow_closed_pipe():
        summary = score(args)
        if args.json:
            print(json.dumps(summary))
    return 0
