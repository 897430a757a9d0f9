"""Measure what observing costs: the share of a quickstart step, and the bytes of TensorBoard per 1,000 steps.

    python tools/bench_observe.py [--steps 200] [--json]

One process trains the quickstart. Blocks of five steps with everything on (metrics, TensorBoard, rollout files, alarms,
summary) alternate with blocks in which the observer does nothing, so that both have the same machine and model. The
first step of a block is not counted: it pays for what the block before left to a background thread.

`measured` is the CPU time of what observing runs, divided by the mean CPU time of a step without it: the CPU time for
which the observer holds the main thread, and the difference of the CPU time of all other threads between steps with
everything on and steps without. `reference` is the limit of 1 %. `standard_error` is that of `measured`.

`whole_share` is the difference of the CPU time of whole steps, which also has indirect effects, such as caches that
other threads fill. The time of a step changes with the lengths of its answers and with the machine by much more than
the limit. So the difference is a coefficient of a least-squares fit of a step's CPU time, beside its sampled tokens,
its longest answer, its padded tokens and a constant for each pair of successive blocks; `whole_standard_error` is its
standard error. The two numbers must agree within their errors.

`wall_share` is the fit for the wall clock, and `direct_share` the wall time for which the observer stops the loop.
Nothing else comes at some steps only: there is no evaluation, and the last step, with the checkpoint, does not count.
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
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np

if TYPE_CHECKING:
    from grpo_mega.trainer.step_metrics import StepResult

ROOT = Path(__file__).resolve().parents[1]
BLOCK = 5
LIMIT = 0.01
BYTES_LIMIT = 100e6  # of TensorBoard, for 1,000 steps


@dataclass(frozen=True)
class ObservedStep:
    """Times of one step, in seconds, and its size.

    Attributes:
        step: its number.
        is_observed: whether everything was on.
        seconds: on the wall clock.
        cpu_seconds: of all threads of the process.
        other_cpu_seconds: of all threads but the main one.
        observer_seconds: the part of `seconds` in which the observer stopped the loop.
        observer_cpu_seconds: CPU time of the main thread in this part.
        size: sampled tokens, tokens of the longest answer, and trained tokens with padding.
    """

    step: int
    is_observed: bool
    seconds: float
    cpu_seconds: float
    other_cpu_seconds: float
    observer_seconds: float
    observer_cpu_seconds: float
    size: tuple[float, ...] = ()


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
    kept = [t for t in times[:-1] if counts(t.step)]
    on, off = ([t for t in kept if t.is_observed == wanted] for wanted in (True, False))
    if not on or not off:
        raise ValueError(f"{len(times)} steps have {len(on)} and {len(off)} that count; use at least {4 * BLOCK}")
    without = statistics.fmean(t.cpu_seconds for t in off)
    added = [[t.observer_cpu_seconds + t.other_cpu_seconds for t in part] for part in (on, off)]
    cpu = (statistics.fmean(added[0]) - statistics.fmean(added[1])) / without
    (whole, whole_error), (wall, _) = (_added_share(kept, name) for name in ("cpu_seconds", "seconds"))
    per_step = tensorboard_bytes / sum(t.is_observed for t in times)
    return {
        "name": "observe",
        "measured": cpu,
        "reference": LIMIT,
        "ratio": cpu / LIMIT,
        "unit": "share of a step",
        "standard_error": sum(statistics.variance(part) / len(part) for part in added) ** 0.5 / without,
        "whole_share": whole,
        "whole_standard_error": whole_error,
        "wall_share": wall,
        "direct_share": statistics.fmean(t.observer_seconds / t.seconds for t in on),
        "seconds_off": statistics.median(t.seconds for t in off),
        "tensorboard_bytes_per_1000_steps": 1000 * per_step,
        "tensorboard_ratio": 1000 * per_step / BYTES_LIMIT,
        "conditions": {"steps": len(times), "block": BLOCK, "cpus": os.cpu_count(), "machine": platform.processor()},
    }


def _added_share(kept: Sequence[ObservedStep], name: str) -> tuple[float, float]:
    """Return what observing adds to the time `name` of a step, as a share of a step without it, and its standard error.

    Ordinary least squares, with the number of pairs of blocks as constants; the standard error takes the deviations of
    different steps as independent.
    """
    pair = np.array([(t.step - 1) // (2 * BLOCK) for t in kept])
    constants = (pair[:, None] == np.unique(pair)).astype(float)
    size = np.array([t.size for t in kept], dtype=float).reshape(len(kept), -1)
    size = size[:, size.std(axis=0) > 0]
    size = (size - size.mean(axis=0)) / size.std(axis=0)
    columns = np.column_stack([[t.is_observed for t in kept], size, constants])
    seconds = np.array([getattr(t, name) for t in kept])
    coefficients = np.linalg.lstsq(columns, seconds, rcond=None)[0]
    degrees = max(len(kept) - np.linalg.matrix_rank(columns), 1)
    variance = ((seconds - columns @ coefficients) ** 2).sum() / degrees
    deviation = float(np.sqrt(variance * np.linalg.pinv(columns.T @ columns)[0, 0]))
    without = statistics.fmean(getattr(t, name) for t in kept if not t.is_observed)
    return float(coefficients[0]) / without, deviation / without


def size_of(result: StepResult) -> tuple[float, ...]:
    """Return sampled tokens, tokens of the longest answer, and trained tokens with padding of the step."""
    completions = result.table.completion_tokens
    rows = result.batch.microbatches
    return float(completions.sum()), float(completions.max()), float(len(rows) * rows.row_tokens)


def measure(steps: int, folder: Path) -> list[ObservedStep]:
    """Train the quickstart for `steps` steps in the run folder `folder`, and return the time of each step."""
    from grpo_mega.config.load import load_config
    from grpo_mega.parallel.ports import free_port
    from grpo_mega.parallel.stop_signal import StopRequests
    from grpo_mega.train import prepare
    from grpo_mega.trainer import build_observer
    from grpo_mega.trainer.reporter import RunReporter
    from grpo_mega.trainer.run import run_job

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    times: list[ObservedStep] = []
    last = [0.0, 0.0, 0.0]

    class AlternatingReporter(RunReporter):
        """Observer that ignores the steps of every other block."""

        def step(self, result: StepResult) -> None:
            begin, main_begin = time.perf_counter(), time.thread_time()
            if is_observed(result.step):
                super().step(result)
            now, cpu, main = time.perf_counter(), time.process_time(), time.thread_time()
            others = cpu - last[1] - (main - last[2])
            spent = now - last[0], cpu - last[1], others, now - begin, main - main_begin
            times.append(ObservedStep(result.step, is_observed(result.step), *spent, size_of(result)))
            last[:] = now, cpu, main

    overrides = [f"train.steps={steps}", f"run.dir={folder}", "data.eval=null", "checkpoint.export_hf=false"]
    overrides += ["checkpoint.every=null", "checkpoint.every_minutes=null"]
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
        error, whole_error = (f"(standard error {result[k]:.2%})" for k in ("standard_error", "whole_standard_error"))
        print(f"observing costs {result['measured']:+.2%} {error} CPU time of a step, limit {LIMIT:.0%}")
        print(f"whole steps differ by {result['whole_share']:+.2%} {whole_error}")
        print(f"TensorBoard: {result['tensorboard_bytes_per_1000_steps'] / 1e6:.1f} MB per 1,000 steps, limit 100 MB")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
