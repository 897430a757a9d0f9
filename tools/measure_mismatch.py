r"""Measure how far the log-probs of policy and engine are apart, in healthy runs and with a wrong engine.

    python tools/measure_mismatch.py [--seeds 1 2 3] [--steps 10] [--wrong-steps 3] [--out DIR] [--json]

Each run is the quickstart without evaluation and with `guard.max_mismatch=null`, in DIR/NAME; a finished run in that
folder is read and not repeated. The healthy runs have each seed, in bf16 with --steps steps and in fp32 with
--wrong-steps. The wrong engines have the first seed and --wrong-steps: after every verification of the weight sync,
tests/helpers/wrong_engine.py changes the memory of the engine. All values come from `rollouts/` of the run folder: the
differences of the loss tokens with a probability above 1e-3, and the decision of the guard at its default bound.

The tables of docs/measurements/mismatch.md are what this prints. Exit code 0: done; 1: a run failed; 2: the input is
wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from grpo_mega.cli.exit_codes import errors_as_exit_codes
from grpo_mega.observe.rollout_files.reader import read_rows, steps_of
from grpo_mega.observe.run_folder import RunFolder
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.trainer.mismatch import ComparedTokens, Differences
from grpo_mega.trainer.mismatch_guard import AUTO, EngineMismatchError, MismatchGuard
from grpo_mega.types import Completion, Prompt, Reward, Rollout, UserError

ROOT = Path(__file__).resolve().parents[1]
WRONG_ENGINE = "tests/helpers/wrong_engine.py:exact"
HEALTHY = "healthy"
CHANGES = {
    "embedding_row": "one row of the embedding is another row",
    "heads": "two heads of one layer are swapped",
    "layer_norm": "one layer norm times 1.1",
    "layer_norm_ones": "one layer norm is all ones",
    "stale_layer": "one layer has the weights of the first sync",
}
"""Kinds of tests/helpers/wrong_engine.py, and their names in the tables."""
QUANTILES = (0.5, 0.999, 0.9999)


@dataclass(frozen=True)
class StepMismatch:
    """Mismatch of one step: the differences in nats, how many exceed the bound, and the decision of the guard."""

    mean: float
    largest: float
    num_tokens: int
    num_beyond: int
    stopped: bool


@dataclass(frozen=True)
class RunMismatch:
    """Mismatch of one run, of all its steps together and of each; `quantiles` are those of QUANTILES, in nats."""

    change: str
    dtype: str
    seed: int
    quantiles: tuple[float, ...]
    steps: tuple[StepMismatch, ...]

    @property
    def num_tokens(self) -> int:
        return sum(step.num_tokens for step in self.steps)

    @property
    def largest(self) -> float:
        return max(step.largest for step in self.steps)

    @property
    def wrong_steps(self) -> tuple[StepMismatch, ...]:
        """The steps in which the engine is wrong: a stale layer is right at the first one."""
        return self.steps[1:] if self.change == "stale_layer" else self.steps


def train(change: str, dtype: str, seed: int, steps: int, out: Path) -> Path:
    """Make one run unless it is finished, and return its folder.

    Raises:
        RuntimeError: the run failed; its message is on the screen.
    """
    folder = out / f"{change}-{dtype}-{seed}-{steps}"
    if _is_finished(folder, steps):
        return folder
    settings = [f"precision.dtype={dtype}", f"run.seed={seed}", f"train.steps={steps}", f"run.dir={folder}"]
    settings += ["data.eval=null", "run.world_size=1", "guard.max_mismatch=null", "weight_sync.verify=every"]
    if change != HEALTHY:
        settings.append(f"reward.terms=[{{name: '{WRONG_ENGINE}'}}]")
    script = str(ROOT / "launch" / "train.sh")
    command = [sys.executable, "-m", "grpo_mega.launch", script, "configs/quickstart.yaml", *settings]
    env = os.environ | {"WRONG_ENGINE": change}
    if subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, check=False).returncode != 0:
        raise RuntimeError(f"the run {folder.name} failed; its message is above")
    return folder


def _is_finished(folder: Path, steps: int) -> bool:
    file = folder / "summary.json"
    if not file.is_file():
        return False
    summary = json.loads(file.read_text(encoding="utf-8"))
    return (summary["status"], summary["steps"]) == ("done", steps)


def rollouts_of(folder: Path) -> tuple[list[Rollout], list[list[float]]]:
    """Return the rollouts of a step of `rollouts/`, and the policy's log-probs of their loss tokens in nats."""
    rollouts, olds = [], []
    for row in read_rows(folder):
        mask = None if row["loss_mask"] is None else tuple(row["loss_mask"])
        completion = Completion(
            token_ids=tuple(row["completion_ids"]),
            sampler_log_probs=tuple(row["sampler_log_probs"]),
            stop_reason=row["stop_reason"],
            policy_version=row["policy_version"],
            text=row["completion"],
            loss_mask=mask,
        )
        prompt = Prompt(row["prompt_index"], row["prompt"], tuple(row["prompt_ids"]), row["answer"])
        rollouts.append(Rollout(prompt, completion, Reward(row["reward"]), row["replica"]))
        olds.append(list(compress(row["old_log_probs"], mask or [True] * len(row["old_log_probs"]))))
    return rollouts, olds


def compare(rollouts: Sequence[Rollout], olds: Sequence[Sequence[float]]) -> ComparedTokens:
    """Compare the loss tokens of recorded rollouts."""
    groups = SampledGroups.of(rollouts, 1)
    old = groups.tokens.on_loss_tokens(groups.tokens.sampler_log_probs)
    old = old.with_values(np.concatenate([np.array(row) for row in olds]))
    return ComparedTokens(Differences.of(groups.tokens, old), groups.table)


def quantile(ordered: Sequence[float], fraction: float) -> float:
    """Return the smallest value that at least this fraction of the ordered values does not exceed."""
    return ordered[math.ceil(fraction * len(ordered)) - 1]


def read(folder: Path, change: str, dtype: str, seed: int) -> RunMismatch:
    """Read the mismatch of a finished run from its folder."""
    bound, steps, all_sizes = AUTO[dtype], list[StepMismatch](), list[float]()
    guard = MismatchGuard(bound, "", is_exact=dtype == "fp32")
    for step in steps_of(RunFolder(folder).rollouts):
        compared = compare(*rollouts_of(RunFolder(folder).rollouts_of(step)))
        found = compared.differences
        sizes = found.sizes[found.is_likely].tolist()
        try:
            guard.check(len(steps) + 1, compared, lambda array: array[None], "")
            stopped = False
        except EngineMismatchError:
            stopped = True
        beyond = sum(size > bound for size in sizes)
        steps.append(StepMismatch(statistics.fmean(sizes), max(sizes), len(sizes), beyond, stopped))
        all_sizes += sizes
    all_sizes.sort()
    return RunMismatch(change, dtype, seed, tuple(quantile(all_sizes, f) for f in QUANTILES), tuple(steps))


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def healthy_table(runs: Sequence[RunMismatch]) -> str:
    """Return one row for each healthy run."""
    names = ["median", "99.9%", "99.99%", "largest", "steps with a token beyond the bound", "steps stopped"]
    rows = [["dtype", "seed", "steps", "tokens", *names]]
    for run in runs:
        if run.change == HEALTHY:
            rows.append(
                [
                    f"{run.dtype}",
                    f"{run.seed}",
                    f"{len(run.steps)}",
                    f"{run.num_tokens:,}",
                    *(f"{value:.2g}" for value in run.quantiles),
                    f"{run.largest:.2g}",
                    f"{sum(step.num_beyond > 0 for step in run.steps)}",
                    f"{sum(step.stopped for step in run.steps)}",
                ]
            )
    return _markdown(rows)


def wrong_table(runs: Sequence[RunMismatch]) -> str:
    """Return one row for each change of the engine: the largest difference, and the step at which the guard stops."""
    rows = [["change", *(f"{dtype}, bound {bound:g}: largest; stopped at" for dtype, bound in AUTO.items())]]
    for change, text in CHANGES.items():
        cells = []
        for dtype in AUTO:
            found = [run for run in runs if (run.change, run.dtype) == (change, dtype)]
            largest = max(step.largest for run in found for step in run.wrong_steps)
            cells.append(f"{largest:.2g}; {', '.join(_first_stop(run) for run in found)}")
        rows.append([text, *cells])
    return _markdown(rows)


def _first_stop(run: RunMismatch) -> str:
    stops = [number for number, step in enumerate(run.steps, start=1) if step.stopped]
    return f"step {stops[0]}" if stops else f"not in {len(run.steps)} steps"


def mean_table(runs: Sequence[RunMismatch]) -> str:
    """Return the range over the steps of the mean difference of a step, for healthy runs and each change."""
    rows = [["run", *AUTO]]
    for change, text in ((HEALTHY, HEALTHY), *CHANGES.items()):
        cells = []
        for dtype in AUTO:
            steps = [step for run in runs if (run.change, run.dtype) == (change, dtype) for step in run.wrong_steps]
            means = [step.mean for step in steps]
            cells.append(f"{min(means):.2g} to {max(means):.2g} ({len(means)} steps)")
        rows.append([text, *cells])
    return _markdown(rows)


def report(runs: Sequence[RunMismatch]) -> str:
    """Return the three tables in Markdown."""
    return "\n".join((healthy_table(runs), wrong_table(runs), mean_table(runs)))


def runs_of(found: Sequence[dict[str, Any]]) -> list[RunMismatch]:
    """Return the results that --json printed."""
    return [
        RunMismatch(
            **run | {"quantiles": tuple(run["quantiles"]), "steps": tuple(StepMismatch(**s) for s in run["steps"])}
        )
        for run in found
    ]


def measure(args: argparse.Namespace) -> Iterator[RunMismatch]:
    """Make all runs, one after the other, and yield their results."""
    for dtype, steps in (("bf16", args.steps), ("fp32", args.wrong_steps)):
        for seed in args.seeds:
            yield read(train(HEALTHY, dtype, seed, steps, args.out), HEALTHY, dtype, seed)
    for change in CHANGES:
        for dtype in AUTO:
            folder = train(change, dtype, args.seeds[0], args.wrong_steps, args.out)
            yield read(folder, change, dtype, args.seeds[0])


@errors_as_exit_codes(RuntimeError)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds of the healthy runs")
    parser.add_argument("--steps", type=int, default=10, help="steps of the healthy runs in bf16 (default 10)")
    parser.add_argument("--wrong-steps", type=int, default=3, help="steps of all other runs, at least 2 (default 3)")
    parser.add_argument("--out", type=Path, default=Path("runs/measure_mismatch"), help="folder of the runs")
    parser.add_argument("--json", action="store_true", help="print the results as JSON on the last line")
    args = parser.parse_args(argv)
    args.out = args.out.resolve()
    if args.steps < 1 or args.wrong_steps < 2:
        raise UserError(
            f"--steps={args.steps} --wrong-steps={args.wrong_steps}: too few",
            remedy="use at least 1 and 2; a stale layer is right at the first step",
        )
    runs = list(measure(args))
    print(report(runs), end="")
    if args.json:
        found: list[dict[str, Any]] = [asdict(run) for run in runs]
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
