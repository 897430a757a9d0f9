"""Put five failures into small runs, and check that each raises its alarm; healthy runs must raise none.

    python tools/check_alarms.py OUT_DIR [--only NAME ...] [--seeds N] [--steps N]

The runs are quickstarts with 16 prompts a step. A failure begins with the run (learning rate, wrong data), at step 2
(forbidden word, with the quickstart's 64 prompts: later the policy samples too few blanks to learn them fast), or at
step 12. Its alarm must be raised within 10 steps from then. The runs and a table, `alarms.md`, are in OUT_DIR; a run
that is there already is not made again.

Exit code 0: all as expected; 1: an alarm is missing or false, or a run failed; 2: wrong input.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from grpo_mega.observe.alarms import Alarms
from grpo_mega.observe.history import read_lines

FIRST = 12
"""First step of a failure that is compared with the run's own first steps."""
WITHIN = 10
"""Steps from the begin of a failure in which its alarm must be raised."""
_ROOT = Path(__file__).resolve().parents[1]
_SMALL = ("quickstart", "data.prompts_per_step=16", "train.minibatches_per_epoch=4", "data.eval=null")
_STOPPED_SECONDS, _RUNNING_SECONDS = 0.1, 0.05  # of the slow rank


@dataclass(frozen=True)
class AlarmCase:
    """A run.

    Attributes:
        name: of the failure, or of the healthy run.
        begins: first step with the failure; None: a healthy run.
        expected: alarms of which one must be raised.
        overrides: keys of the config.
    """

    name: str
    begins: int | None
    expected: tuple[str, ...]
    overrides: tuple[str, ...]


def cases(folder: Path, seeds: int, steps: int) -> list[AlarmCase]:
    """Return all runs; `folder` gets the data of the wrong data source."""
    wrong = folder / "wrong.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "answer": "none"} for a in range(10, 60) for b in range(10, 30)]
    wrong.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    both = f"[{{path: 'arithmetic:train', name: right}}, {{path: {wrong}, name: wrong}}]"
    module = _ROOT / "tools" / "alarm_failures.py"
    words = f"[{{name: exact}}, {{name: {module}:word, weight: 10.0}}]"
    # the second term is always 0: it only imports the module into the ranks
    injected = f"reward.terms=[{{name: exact}}, {{name: {module}:word, weight: 0.0}}]"
    last = f"train.steps={FIRST + WITHIN - 1}"
    early = f"train.steps={WITHIN}"
    size = ("data.prompts_per_step=64", "train.minibatches_per_epoch=8")
    stale = "mismatch of policy and engine"
    term = ("a reward term falls", "reward up, accuracy down")
    return [
        *(AlarmCase(f"healthy {s}", None, (), (f"run.seed={s}", f"train.steps={steps}")) for s in range(1, seeds + 1)),
        AlarmCase("healthy two ranks", None, (), ("run.world_size=2", f"train.steps={steps}")),
        AlarmCase("forbidden word", 2, term, (f"reward.terms={words}", f"train.steps={1 + WITHIN}", *size)),
        AlarmCase(
            "learning rate x100", 1, ("far from the reference",), ("optimizer.lr=2e-2", "optimizer.min_lr=1e-3", early)
        ),
        AlarmCase("stale engine", FIRST, (stale,), (injected, "guard.max_mismatch=null", last)),
        AlarmCase("slow rank", FIRST, ("slow rank",), (injected, "run.world_size=2", last)),
        AlarmCase("wrong data source", 1, ("one set is never right",), (f"data.train={both}", early)),
    ]


def run(case: AlarmCase, folder: Path) -> int:
    """Make the run in `folder` and return its exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    step_file = folder / "step"
    environment = {
        **os.environ,
        "ALARM_FAILURE": case.name,
        "ALARM_FIRST_STEP": str(case.begins or 0),
        "ALARM_STEP_FILE": str(step_file),
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [
        sys.executable,
        "-m",
        "grpo_mega.cli.main",
        "train",
        *_SMALL,
        *case.overrides,
        f"run.dir={folder / 'run'}",
    ]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, cwd=_ROOT, env=environment, stdout=output, stderr=output)
        while process.poll() is None:
            if case.name == "slow rank" and _step(step_file) >= FIRST:
                _stop_for_a_moment(int(step_file.with_suffix(".pid").read_text()))
            else:
                time.sleep(0.1)
    return process.returncode


def _step(path: Path) -> int:
    return int(path.read_text()) if path.exists() else 0


def _stop_for_a_moment(pid: int) -> None:
    """Stop the process for two thirds of a moment: it works three times as slowly."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(_STOPPED_SECONDS)
        os.kill(pid, signal.SIGCONT)
    time.sleep(_RUNNING_SECONDS)


def raised_alarms(metrics: Path) -> list[tuple[int, str, str]]:
    """Return (step, name, text) of each alarm that the rules of this version raise on the metrics of a run."""
    alarms, found = Alarms(), []
    for step, line in read_lines(metrics):
        found += [(step, alarm.name, alarm.text) for alarm in alarms.step(step, line)]
    return found


def verdict(case: AlarmCase, found: Sequence[tuple[int, str, str]]) -> tuple[bool, str]:
    """Return whether the alarms are right, and a line for the table."""
    shown = "; ".join(f"step {step}: {name} ({text})" for step, name, text in found) or "none"
    if case.begins is None:
        return not found, f"| {case.name} | | none | {shown} |"
    steps = [step - case.begins + 1 for step, name, _ in found if name in case.expected]
    is_right = bool(steps) and min(steps) <= WITHIN and all(step >= case.begins for step, _, _ in found)
    return is_right, f"| {case.name} | step {case.begins} | {' or '.join(case.expected)} | {shown} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--only", nargs="+", help="names of the runs to make")
    parser.add_argument("--seeds", type=int, default=3, help="number of healthy runs")
    parser.add_argument("--steps", type=int, default=25, help="steps of a healthy run")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = [
        case for case in cases(args.out.resolve(), args.seeds, args.steps) if case.name in (args.only or [case.name])
    ]
    if not chosen:
        print(f"error: --only={' '.join(args.only)} names no run", file=sys.stderr)
        return 2
    rows, all_right = [], True
    for case in chosen:
        folder = args.out.resolve() / case.name.replace(" ", "_")
        code = 0 if (folder / "run" / "summary.json").exists() else run(case, folder)
        metrics = folder / "run" / "metrics.jsonl"
        found = raised_alarms(metrics) if metrics.exists() else []
        is_right, row = verdict(case, found)
        is_right = is_right and code == 0
        all_right = all_right and is_right
        rows.append(row)
        print(f"{'ok   ' if is_right else 'WRONG'} {row}" + (f" exit code {code}" if code else ""), flush=True)
    head = "| run | failure from | alarm | raised |\n|---|---|---|---|\n"
    (args.out / "alarms.md").write_text(head + "\n".join(rows) + "\n")
    return 0 if all_right else 1


if __name__ == "__main__":
    sys.exit(main())
