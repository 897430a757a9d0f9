"""Print the rollouts of a step of a run, prompt and completion side by side, or as JSON.

    grpo-mega rollouts RUN_DIR --step 12
    grpo-mega rollouts RUN_DIR --step 12 --where "reward < 0.5 and len(completion_ids) > 100"
    grpo-mega rollouts RUN_DIR --step 12 --jsonl > step_12.jsonl
    grpo-mega rollouts RUN_DIR --step 12 --quarantine

Without --step it prints the last step that has a complete part. The columns are those of docs/reference/rollouts.md;
--jsonl prints one object per rollout, with a key per column. A condition compares columns with numbers or quoted texts,
with < <= > >= = !=, `contains`, `in (...)` and `is null`, joined by and, or, not and parentheses:
`reward_components.exact < 1 or completion contains "because"`. Null is neither smaller nor larger than anything.

Characters that a terminal would execute are escaped in the readable form. The run may still be running, or was killed.
Parts that are damaged or missing are named on stderr, and the rollouts of the others are printed.

Exit code 0: done; 1: a part is damaged or missing; 2: the input is wrong.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from grpo_mega.cli.closed_pipe import allow_closed_pipe
from grpo_mega.cli.exit_codes import errors_as_exit_codes
from grpo_mega.config.option_parser import OptionParser
from grpo_mega.types import UserError


def find_step(run: Path, step: int | None, *, quarantine: bool = False) -> Path:
    """Return the folder of the rollouts of a step, or of the last step with a complete part.

    `quarantine`: of the rollouts that a rule of `guard.rules` put aside.

    Raises:
        UserError: the folder is not a run, it has no rollouts, or not those of this step.
    """
    from grpo_mega.observe.rollout_files.reader import steps_of
    from grpo_mega.observe.run_folder import RunFolder

    folder = RunFolder(run)
    if not folder.config.is_file():
        raise UserError(f"RUN_DIR={run} is not the folder of a run (it has no config.yaml)", remedy="name run.dir")
    of_step, parent = folder.rollouts_of, folder.rollouts
    if quarantine:
        of_step, parent = folder.quarantine_of, folder.quarantine
    if step is not None and of_step(step).with_suffix(".jsonl").is_file():
        return of_step(step)  # of an older version, which the reader says
    steps = [n for n in steps_of(parent) if any(of_step(n).glob("part-*.parquet"))]
    if not steps and quarantine:
        raise UserError(
            f"RUN_DIR={run} has no rollouts in quarantine",
            remedy="a rule of guard.rules with the action quarantine writes them",
        )
    if not steps:
        raise UserError(
            f"RUN_DIR={run} has no rollouts yet",
            remedy="wait for its first step; a run with observe.rollouts=none writes none",
        )
    if step is not None and step not in steps:
        raise UserError(f"--step={step}: {run} has no rollouts of this step", remedy=f"use one of {_as_ranges(steps)}")
    return of_step(steps[-1] if step is None else step)


def _as_ranges(steps: Sequence[int]) -> str:
    """Return ascending numbers as for example `1-4, 7`."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and runs[-1][-1] == step - 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def print_rollouts(args: argparse.Namespace) -> int:
    """Print the rollouts; return the exit code.

    Raises:
        UserError: the input is wrong.
    """
    from grpo_mega.observe.atomic_files import to_json
    from grpo_mega.observe.rollout_files.reader import read_step
    from grpo_mega.observe.rollout_files.text_view import render
    from grpo_mega.observe.rollout_files.where import select_rows

    found = read_step(find_step(args.run_dir, args.step, quarantine=args.quarantine))
    table = found.table if args.where is None else select_rows(found.table, args.where)
    width = args.width or shutil.get_terminal_size((120, 24)).columns
    for number, row in enumerate(found.rows(table)):
        if args.jsonl:
            print(to_json(row))
        else:
            print(f"{'' if number == 0 else chr(10)}{render(row, width)}")
    if not args.jsonl and not table.num_rows:
        print(f"none of {found.table.num_rows} rollouts" if found.table.num_rows else "no rollouts")
    for problem in found.problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if found.problems else 0


@errors_as_exit_codes()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a run")
    parser.add_argument("--step", type=int, help="number of the step (default: the last one)")
    parser.add_argument("--quarantine", action="store_true", help="rollouts that a rule of guard.rules put aside")
    parser.add_argument("--where", metavar="CONDITION", help="print only rollouts for which this is true")
    parser.add_argument("--jsonl", action="store_true", help="print one JSON object per rollout")
    parser.add_argument("--width", type=int, help="columns of the readable form (default: those of the terminal)")
    args = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal with another encoding than UTF-8
    code = 0
    with allow_closed_pipe():
        code = print_rollouts(args)
    return code
