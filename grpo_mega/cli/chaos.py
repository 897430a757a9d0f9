"""Disturb training runs with signals at random moments, and check that each ends as the undisturbed run.

    grpo-mega chaos [--number 60] [--seed 0] [--only NAME] [--config CONFIG] [--work DIR] [--json]

Small runs on this machine, over layouts and engines: a rank, the launcher, a process of the engine, a reward worker or
an engine server gets SIGKILL, SIGTERM, SIGINT or SIGSTOP. The same command is started again until it succeeds. Then
policy, metrics and rollouts must equal those of the undisturbed run (with sampling during training: every prompt that
was begun must be trained once or carried at the end), and no process, shared memory or temporary file
may be left 15 s after the end of a command.

Exit code 0: all cases ended so; 1: one did not; 2: wrong input.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from grpo_mega.cli.chaos_cases import SCENARIOS, Scenario, draw_cases
from grpo_mega.cli.chaos_run import ChaosOutcome, ChaosRuns
from grpo_mega.cli.exit_codes import errors_as_exit_codes
from grpo_mega.config.option_parser import OptionParser
from grpo_mega.types import UserError

_ENDED = {True: "equal, nothing left", False: "no prompt lost or used twice, nothing left"}


@errors_as_exit_codes(RuntimeError)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=60, help="number of disturbed runs (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="determines all cases (default: 0)")
    parser.add_argument("--only", action="append", help="only scenarios whose name contains this; may be repeated")
    parser.add_argument("--config", default="quickstart", help="CONFIG of the runs (default: quickstart)")
    parser.add_argument(
        "--stall-seconds", type=float, default=20.0, help="guard.phase_limits of the runs (default: 20)"
    )
    parser.add_argument("--work", type=Path, help="folder for the runs, which is kept; default: a temporary one")
    parser.add_argument("--json", action="store_true", help="print the outcomes as one JSON object on the last line")
    args = parser.parse_args(argv)
    scenarios = _chosen(args.only)
    if args.number < 1:
        raise UserError(f"--number={args.number} must be at least 1", remedy="use 1 or more")
    work = _work_folder(args.work)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs are ended
    cases = draw_cases(args.number, args.seed, scenarios)
    runs = ChaosRuns(args.config, work, args.stall_seconds)
    outcomes = []
    print(_line("case", "scenario", "signal", "victim", "moment", "starts", "seconds", "outcome"), flush=True)
    for case in cases:
        outcomes.append(runs.run(case))
        print(_row(outcomes[-1]), flush=True)
    failed = [each for each in outcomes if each.problems]
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} ended as the undisturbed run and left nothing behind")
    if args.json:
        print(json.dumps(_as_json(outcomes, args.seed)))
    if args.work is None and not failed:
        shutil.rmtree(work, ignore_errors=True)
    elif failed:
        print(f"the runs are in {work}", file=sys.stderr)
    return 1 if failed else 0


def _chosen(names: Sequence[str] | None) -> tuple[Scenario, ...]:
    if not names:
        return SCENARIOS
    found = tuple(each for each in SCENARIOS if any(name.lower() in each.name.lower() for name in names))
    if not found:
        raise UserError(
            f"--only={', '.join(names)} is in no name of a scenario",
            remedy=f"use a part of one of these: {', '.join(each.name for each in SCENARIOS)}",
        )
    return found


def _work_folder(named: Path | None) -> Path:
    """Return the folder for the runs; its path is short, because TMPDIR of the runs is in it."""
    if named is None:
        return Path(tempfile.mkdtemp(prefix="chaos_"))
    if named.exists():
        raise UserError(f"--work={named} exists", remedy="name a new folder")
    named.mkdir(parents=True)
    return named.resolve()


def _row(outcome: ChaosOutcome) -> str:
    case = outcome.case
    text = _ENDED[case.scenario.is_repeatable] if not outcome.problems else "; ".join(outcome.problems)
    if not outcome.was_hit:
        text += " (the run was complete before the signal)"
    number = f" {case.number}" if case.victim == "rank" else ""
    return _line(
        str(case.index),
        case.scenario.name,
        case.signal.name,
        f"{case.victim}{number}",
        f"{case.moment:.2f}",
        str(outcome.starts),
        f"{outcome.seconds:.0f}",
        text,
    )


def _line(*columns: str) -> str:
    widths = (4, 17, 8, 15, 6, 6, 7, 0)
    return "  ".join(f"{column:<{width}}" for column, width in zip(columns, widths, strict=True)).rstrip()


def _as_json(outcomes: Sequence[ChaosOutcome], seed: int) -> dict[str, object]:
    return {
        "name": "chaos",
        "seed": seed,
        "number": len(outcomes),
        "equal": sum(not each.problems for each in outcomes),
        "disturbed": sum(each.was_hit for each in outcomes),
        "cases": [
            {
                "case": str(each.case),
                "starts": each.starts,
                "was_hit": each.was_hit,
                "seconds": each.seconds,
                "problems": list(each.problems),
            }
            for each in outcomes
        ],
    }
