"""Measure updates per hour with partial rollouts, next to synchronous steps of the same model.

    python tools/bench_partial.py [--rounds 3] [--json]

Both sides train the same random model of the quickstart's size, whose answers have p99/p50 of about 8
(step_sides/two_mean_lengths.py). The sides make their steps alternately (step_sides/compared_runs.py). The start of the
processes and the first steps of each side are not counted: a partial run begins with short answers only. `measured` is
the updates per hour with partial rollouts, `reference` those without.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.step_sides.compared_runs import ComparedRuns, CountedSteps  # noqa: E402
from tools.step_sides.two_mean_lengths import GROUP, PER_STEP  # noqa: E402

TARGET = 1.3
WARM_STEPS = 4
PARTIAL = "sampling.partial={oversubmit: 2.0, slice_tokens: 48, max_staleness: 16}"


def summary_of(steps: CountedSteps) -> dict[str, Any]:
    """Return means and quantiles of the steps of one side."""
    p50, p99 = np.percentile(np.concatenate(steps.lengths), (50, 99)).tolist()
    return {
        "steps": len(steps.lines),
        "updates_per_hour": steps.updates_per_hour,
        "tokens_per_second": steps.tokens_per_second,
        "step_seconds_median": statistics.median(steps.seconds),
        "rollout_seconds_median": statistics.median(line["time/rollout_seconds"] for line in steps.lines),
        "tokens_per_update": statistics.mean(line["train/num_loss_tokens"] for line in steps.lines),
        "staleness_mean": statistics.mean(line.get("rollout/staleness_mean", 0.0) for line in steps.lines),
        "length_p50": p50,
        "length_p99": p99,
        "p99_over_p50": p99 / p50,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run both sides alternately and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each side (default: 3)")
    parser.add_argument("--steps", type=int, default=8, help="steps per round (default: 8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    options = parser.parse_args(argv)
    with TemporaryDirectory(prefix="bench_partial_", ignore_cleanup_errors=True) as folder:
        runs = ComparedRuns(Path(folder), num_prompts=2000)
        ends = [WARM_STEPS + done * options.steps for done in range(1, options.rounds + 1)]
        runs.train_alternately({"synchronous": (), "partial": (PARTIAL,)}, ends)
        partial, synchronous = (runs.counted_steps(name, WARM_STEPS) for name in ("partial", "synchronous"))
    found = {
        "name": "partial_rollouts",
        "measured": partial.updates_per_hour,
        "reference": synchronous.updates_per_hour,
        "ratio": partial.updates_per_hour / synchronous.updates_per_hour,
        "ratio_tokens_per_second": partial.tokens_per_second / synchronous.tokens_per_second,
        "unit": "updates/hour",
        "target": TARGET,
        "partial": summary_of(partial),
        "synchronous": summary_of(synchronous),
        "conditions": f"{options.rounds} rounds of {options.steps} steps, {PER_STEP} prompts x {GROUP} rollouts, "
        f"{PARTIAL}, vLLM, 1 rank, {platform.processor() or platform.machine()}",
    }
    print(json.dumps(found) if options.json else json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
