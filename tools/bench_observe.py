"""Measure what observing costs: the share of a quickstart step, and the bytes of TensorBoard per 1,000 steps.

    python tools/bench_observe.py [--steps 200] [--json]

One process trains the quickstart. Blocks of five steps with everything on (metrics, TensorBoard, rollout files, alarms,
summary) alternate with blocks in which the observer does nothing, so that both have the same machine and model. The
first step of a block is not counted: it pays for what the block before left to a background thread.

`measured` is the mean CPU time of a step with everything on, divided by that without, minus 1; `reference` is the limit
of 1 %. CPU time includes background threads and does not count what other programs take. `wall_share` is the same for
the wall clock, and `direct_share` the time for which the observer stops the loop. `standard_error` is that of
`measured`, from the pairs of successive blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
BLOCK = 5
LIMIT = 0.01
BYTES_LIMIT = 100e6  # of TensorBoard, for 1,000 steps


@dataclass(frozen=True)
class ObservedStep:
    """Times of one step, in seconds. `observer_seconds` is the part in which the observer stopped the loop."""

    step: int
    is_observed: bool
    seconds: float
    cpu_seconds: float
    observer_seconds: float


def is_observed(step: int) -> bool:
    """Return True for the steps (from 1) of the blocks with everything on, which come second."""
    return (step - 1) // BLOCK % 2 == 1


def counts(step: int) -> bool:
    """Return False for the first step of each block, and for the first two blocks, in which the process warms up."""
    return step > 2 * BLOCK and (step - 1) % BLOCK > 0


def summarize(times: Sequence[ObservedStep], tensorboard_bytes: int) -> dict[str, Any]:
    """Return the result as one JSON object.

    Raises:
        ValueError: there are no steps that count of one kind.
    """
    kept = [t for t in times if counts(t.step)]
    on, off = ([t for t in kept if t.is_observed == wanted] for wanted in (True, False))
    if not on or not off:
        raise ValueError(f"{len(times)} steps have {len(on)} and {len(off)} that count; use at least {4 * BLOCK}")
    cpu, wall = (
        statistics.fmean(getattr(t, name) for t in on) / statistics.fmean(getattr(t, name) for t in off) - 1
        for name in ("cpu_seconds", "seconds")
    )
    per_step = tensorboard_bytes / sum(t.is_observed for t in times)
    return {
        "name": "observe",
        "measured": cpu,
        "reference": LIMIT,
        "ratio": cpu / LIMIT,
        "unit": "share of a step",
        "standard_error": _standard_error(kept),
        "wall_share": wall,
        "direct_share": statistics.fmean(t.observer_seconds / t.seconds for t in on),
        "seconds_off": statistics.median(t.seconds for t in off),
        "tensorboard_bytes_per_1000_steps": 1000 * per_step,
        "tensorboard_ratio": 1000 * per_step / BYTES_LIMIT,
        "conditions": {"steps": len(times), "block": BLOCK, "cpus": os.cpu_count(), "machine": platform.processor()},
    }


def _standard_error(kept: Sequence[ObservedStep]) -> float:
    """Return the standard error of the mean over pairs of blocks; 0 for one pair."""
    pairs: dict[int, dict[bool, list[float]]] = {}
    for t in kept:
        pairs.setdefault((t.step - 1) // (2 * BLOCK), {}).setdefault(t.is_observed, []).append(t.cpu_seconds)
    whole = [pair for pair in pairs.values() if len(pair) == 2]
    shares = [statistics.fmean(pair[True]) / statistics.fmean(pair[False]) - 1 for pair in whole]
    return statistics.stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else 0.0


def measure(steps: int, folder: Path) -> list[ObservedStep]:
    """Train the quickstart for `steps` steps in the run folder `folder`, and return the time of each step."""
    from grpo_mega.config.load import load_config
    from grpo_mega.parallel.ports import free_port
    from grpo_mega.parallel.stop_signal import StopRequests
    from grpo_mega.train import prepare
    from grpo_mega.trainer import build_observer
    from grpo_mega.trainer.reporter import RunReporter
    from grpo_mega.trainer.run import run_job
    from grpo_mega.trainer.step_metrics import StepResult

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    times: list[ObservedStep] = []
    last = [0.0, 0.0]

    class AlternatingReporter(RunReporter):
        """Observer that ignores the steps of every other block."""

        def step(self, result: StepResult) -> None:
            begin = time.perf_counter()
            if is_observed(result.step):
                super().step(result)
            now, cpu = time.perf_counter(), time.process_time()
            times.append(ObservedStep(result.step, is_observed(result.step), now - last[0], cpu - last[1], now - begin))
            last[:] = now, cpu

    overrides = [f"train.steps={steps}", f"run.dir={folder}", "data.eval=null", "checkpoint.export_hf=false"]
    prepared = prepare(load_config(ROOT / "configs" / "quickstart.yaml", overrides))
    # the job builds its observer itself
    with patch.object(build_observer, "RunReporter", AlternatingReporter):
        run_job(prepared.config, prepared.topology, prepared.train_data, prepared.eval_prompts, StopRequests())
    return times


def main() -> None:
    """Measure and print; `--json` prints only the object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="steps of the run, at least 20")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "run"
        times = measure(arguments.steps, folder)
        size = sum(path.stat().st_size for path in (folder / "tensorboard").iterdir())
        result = summarize(times, size)
    if not arguments.json:
        error = f"(standard error {result['standard_error']:.2%})"
        print(f"observing costs {result['measured']:+.2%} {error} CPU time of a step, limit {LIMIT:.0%}")
        print(f"TensorBoard: {result['tensorboard_bytes_per_1000_steps'] / 1e6:.1f} MB per 1,000 steps, limit 100 MB")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
