"""Compare simulated steps (plan --lengths) with real ones, synchronous and with partial rollouts, on CPU.

    python tools/bench_simulator.py [--steps 10] [--json]

Both jobs train the model of tools/bench_partial.py, whose answers have p99/p50 of about 8. The engine is calibrated on
calls with other prompts and limits: seconds = c0 + c1 rollouts + c2 steps + c3 tokens + c4 cached tokens read + c5
tokens computed again. The policy's seconds per token, and the lengths that are simulated, come from the first steps of
the synchronous job, which are not compared. CPU seconds of the job's process are compared, because other programs
change them least. `measured` and `reference` are the simulated and the real seconds of an update with partial rollouts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


from grpo_mega.parallel.ports import free_port  # noqa: E402
from grpo_mega.planner.simulation.costs import EngineCost, PolicyCost  # noqa: E402
from grpo_mega.planner.simulation.lengths import recorded_lengths  # noqa: E402
from grpo_mega.planner.simulation.partial import PartialSettings, simulate_partial  # noqa: E402
from grpo_mega.planner.simulation.synchronous import simulate_synchronous  # noqa: E402
from grpo_mega.planner.simulation.workload import SimulatedJob, colocated_mode  # noqa: E402
from tools.bench_step import Side  # noqa: E402
from tools.step_sides.two_mean_lengths import GROUP, MAX_TOKENS, PER_STEP, write_model_and_prompts  # noqa: E402

TARGET = 0.15
WARM_STEPS, LENGTH_STEPS = 2, 10
MEAN_PROMPT = 12
PARTIAL = {"oversubmit": 2.0, "slice_tokens": 16, "max_staleness": 16}
FEATURES = ("rollouts", "steps", "tokens", "cached", "recomputed")


class JobSide(Side):
    """A job in a process of its own (step_sides/simulated_side.py)."""

    def ask(self, name: str, **more: Any) -> dict[str, Any]:
        """Send a command and return the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"name": name, **more}) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = self._answer()
        return answer


def fitted_cost(calls: Sequence[dict[str, float]], max_running: int) -> tuple[EngineCost, float]:
    """Return the costs that calls of the engine have shown, and the median relative error of their seconds.

    Args:
        calls: features of the calls, with their CPU seconds.
        max_running: most rollouts that run at the same time.
    """
    features = np.array([[1.0, *(call[name] for name in FEATURES)] for call in calls])
    seconds = np.array([call["cpu_seconds"] for call in calls])
    fitted = _non_negative_fit(features / seconds[:, None])
    call, rollout, step, token, cached, prefill = fitted.tolist()
    error = float(np.median(np.abs(features @ fitted / seconds - 1)))
    numbers = range(max_running + 1)
    zeros = [0.0 for _ in numbers]
    cost = EngineCost(
        read=[step + token * n for n in numbers],
        compute=zeros,
        other=zeros,
        cached_token=cached,
        prefill_token=prefill,
        call=call,
        submitted_rollout=rollout,
    )
    return cost, error


def _non_negative_fit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return factors of at least 0 whose sums over the columns are close to 1; the most negative become 0 in turn."""
    used = np.ones(rows.shape[1], dtype=bool)
    while True:
        found = np.zeros(rows.shape[1])
        found[used] = np.linalg.lstsq(rows[:, used], np.ones(len(rows)), rcond=None)[0]
        if (found >= 0).all():
            return found
        used[found.argmin()] = False


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Calibrate, make the steps of both jobs, simulate them, and return the comparison."""
    model, prompts = write_model_and_prompts(folder, 2000)
    settings = {
        "model": str(model),
        "prompts": str(prompts),
        "num_prompts": PER_STEP,
        "group_size": GROUP,
        "max_tokens": MAX_TOKENS,
        "max_prompt_tokens": 16,
        "max_tokens_per_microbatch": 2048,
        "threads": 1,
    }
    jobs: dict[str, JobSide] = {}
    try:
        for name, partial in (("synchronous", None), ("partial", PARTIAL)):
            own = settings | {"partial": partial, "run_dir": str(folder / name), "port": str(free_port())}
            script = ROOT / "tools" / "step_sides" / "simulated_side.py"
            jobs[name] = JobSide(Path(sys.executable), script, own, folder / f"{name}.log")
        known = [jobs["synchronous"].ask("step") for _ in range(WARM_STEPS + LENGTH_STEPS)][WARM_STEPS:]
        for _ in range(WARM_STEPS + LENGTH_STEPS):
            jobs["partial"].ask("step")
        steps: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
        calls = list(jobs["synchronous"].ask("calibrate", seed=1)["calls"])
        for _ in range(options.steps):
            for name, job in jobs.items():
                steps[name].append(job.ask("step"))
        calls += jobs["synchronous"].ask("calibrate", seed=2)["calls"]
    finally:
        for job in jobs.values():
            job.close()
    return compare(known, calls, steps)


def compare(
    known: Sequence[dict[str, Any]], calls: Sequence[dict[str, float]], steps: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """Return simulated and measured CPU seconds of an update.

    Args:
        known: steps that give the lengths and the policy's seconds.
        calls: calls of the engine that give its costs.
        steps: name of the mode -> steps to compare.
    """
    cost, error = fitted_cost(calls, PER_STEP * GROUP * 2)
    rows = [np.array(group, dtype=np.int64) for step in known for group in step["groups"]]
    tokens = [sum(sum(group) for group in step["groups"]) + PER_STEP * GROUP * MEAN_PROMPT for step in known]
    policy = [step["cpu_seconds"] - step["engine_cpu_seconds"] for step in known]
    per_token = statistics.median(seconds / count for seconds, count in zip(policy, tokens, strict=True))
    job = SimulatedJob(
        recorded_lengths("first steps", rows, MAX_TOKENS),
        MEAN_PROMPT,
        PER_STEP,
        GROUP,
        1,
        1,
        cost,
        PolicyCost(0.0, per_token),
    )
    partial = PartialSettings(PARTIAL["oversubmit"], int(PARTIAL["slice_tokens"]), int(PARTIAL["max_staleness"]))
    simulated = {
        "synchronous": colocated_mode(job, "synchronous", simulate_synchronous(job, 100, seed=0)),
        "partial": colocated_mode(job, "partial", simulate_partial(job, partial, 120, seed=0)[20:]),
    }
    modes = {}
    for name, found in steps.items():
        real = statistics.mean(step["cpu_seconds"] for step in found)
        engine = statistics.mean(step["engine_cpu_seconds"] for step in found)
        mode = simulated[name]
        policy_seconds = per_token * mode.tokens_per_step
        modes[name] = {
            "simulated_seconds": mode.step_seconds,
            "measured_seconds": real,
            "error": mode.step_seconds / real - 1,
            "simulated_engine_seconds": mode.step_seconds - policy_seconds,
            "measured_engine_seconds": engine,
            "measured_wall_seconds": statistics.mean(step["seconds"] for step in found),
            "simulated_tokens": mode.tokens_per_step - PER_STEP * GROUP * MEAN_PROMPT,
            "measured_tokens": statistics.mean(sum(map(sum, step["groups"])) for step in found),
            "staleness_mean": mode.staleness_mean,
            "steps": len(found),
        }
    ratio = modes["synchronous"]["simulated_seconds"] / modes["partial"]["simulated_seconds"]
    summary = job.lengths.summary()
    return {
        "name": "simulator",
        "measured": modes["partial"]["simulated_seconds"],
        "reference": modes["partial"]["measured_seconds"],
        "ratio": modes["partial"]["simulated_seconds"] / modes["partial"]["measured_seconds"],
        "unit": "CPU seconds per update",
        "target": TARGET,
        "largest_error": max(abs(mode["error"]) for mode in modes.values()),
        "simulated_gain": ratio,
        "measured_gain": modes["synchronous"]["measured_seconds"] / modes["partial"]["measured_seconds"],
        "modes": modes,
        "calibration": {"calls": len(calls), "median_error": error, "p99_over_p50": summary.p99 / summary.p50}
        | {"call": cost.call, "rollout": cost.submitted_rollout, "step": cost.read[0]}
        | {"token": cost.read[1] - cost.read[0], "cached": cost.cached_token, "recomputed": cost.prefill_token},
        "conditions": f"{PER_STEP} prompts x {GROUP} rollouts, {PARTIAL}, vLLM, 1 rank, 1 thread, "
        f"{platform.processor() or platform.machine()}, load average {os.getloadavg()[0]:.1f}",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison; return 1 if an error is above the target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="steps of each job that are compared (default: 10)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    options = parser.parse_args(argv)
    with TemporaryDirectory(prefix="bench_simulator_", ignore_cleanup_errors=True) as folder:
        result = measure(options, Path(folder))
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))
    return 0 if result["largest_error"] <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
