"""Measure updates per hour with sampling during training, next to synchronous steps with the same engine server.

    python tools/bench_async.py [--rounds 3] [--max-staleness 2] [--json]

Both sides train the model of step_sides/two_mean_lengths.py on one rank, with one engine server that serves them in
turn. The sides make their steps alternately (step_sides/compared_runs.py). The first steps of each round are not
counted: the buffer of a continued run holds little. What it holds at the first and the last counted step is in the
output: if it shrank, the rate is too high. `measured` is the updates per hour with sampling during training,
`reference` those without. `simulated` has the steps that `plan --lengths` would predict from the lengths and the times
of the synchronous side (step_sides/simulated_servers.py).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.step_sides.compared_runs import ComparedRuns, CountedSteps  # noqa: E402
from tools.step_sides.simulated_servers import simulate_steps  # noqa: E402
from tools.step_sides.two_mean_lengths import GROUP, PER_STEP  # noqa: E402

TARGET = 1.5
WARM_STEPS = 5  # of each round
MEANS = (
    "time/step_seconds",
    "time/rollout_seconds",
    "time/train_seconds",
    "time/sync_seconds",
    "train/num_loss_tokens",
    "rollout/staleness_mean",
    "rollout/dropped_groups",
    "rollout/ready_groups",
    "rollout/policy_wait_seconds",
    "rollout/sampler_wait_seconds",
)


def summary_of(steps: CountedSteps) -> dict[str, Any]:
    """Return rates, and the mean of each metric that the side has."""
    lines = steps.lines
    means = {name: statistics.mean(line[name] for line in lines) for name in MEANS if name in lines[0]}
    rates = {"updates_per_hour": steps.updates_per_hour, "tokens_per_second": steps.tokens_per_second}
    groups = [line["rollout/carried_groups"] for line in lines if "rollout/carried_groups" in line]
    held = {"carried_groups_first": groups[0], "carried_groups_last": groups[-1]} if groups else {}
    return {"steps": len(lines), **rates, **means, **held}


def main(argv: Sequence[str] | None = None) -> None:
    """Run both sides alternately and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each side (default: 3)")
    parser.add_argument(
        "--steps", type=int, default=13, help=f"steps per round, {WARM_STEPS} not counted (default: 13)"
    )
    parser.add_argument("--max-staleness", type=int, default=2, help="train.max_staleness (default: 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    options = parser.parse_args(argv)
    if options.max_staleness < 1:
        parser.error(f"--max-staleness={options.max_staleness} must be at least 1, the updates of a step")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended
    with TemporaryDirectory(prefix="bench_async_", ignore_cleanup_errors=True) as folder:
        runs = ComparedRuns(Path(folder), 4000, ["algorithm.correction=token_truncated"])
        with serving(Path(folder), runs.arguments) as url:
            served = ("engine.placement=server", f"engine.urls=['{url}']")
            asynchronous = (*served, f"train.max_staleness={options.max_staleness}")
            ends = [done * options.steps for done in range(1, options.rounds + 1)]
            runs.train_alternately({"synchronous": served, "asynchronous": asynchronous}, ends)
        steps = {name: runs.counted_steps(name, WARM_STEPS, options.steps) for name in ("synchronous", "asynchronous")}
        simulated = simulate_steps(steps["synchronous"], options.max_staleness, runs.arguments)
    synchronous, asynchronous_steps = steps["synchronous"], steps["asynchronous"]
    measured = statistics.mean(asynchronous_steps.seconds)
    found = {
        "name": "asynchrony",
        "measured": asynchronous_steps.updates_per_hour,
        "reference": synchronous.updates_per_hour,
        "ratio": asynchronous_steps.updates_per_hour / synchronous.updates_per_hour,
        "ratio_tokens_per_second": asynchronous_steps.tokens_per_second / synchronous.tokens_per_second,
        "unit": "updates/hour",
        "target": TARGET,
        "asynchronous": summary_of(asynchronous_steps),
        "synchronous": summary_of(synchronous),
        "simulated": simulated | {"error": simulated["step_seconds"] / measured - 1},
        "conditions": f"{options.rounds} rounds of {options.steps} steps, {PER_STEP} prompts x {GROUP} rollouts, "
        f"train.max_staleness={options.max_staleness}, one server, 1 rank, "
        f"{platform.processor() or platform.machine()}, load average {os.getloadavg()[0]:.1f}",
    }
    print(json.dumps(found) if options.json else json.dumps(found, indent=2))


@contextmanager
def serving(folder: Path, arguments: Sequence[str]) -> Iterator[str]:
    """Run an engine server with a config and overrides; yield its address.

    Raises:
        RuntimeError: the server exited before it listened.
    """
    with (folder / "server.out").open("w") as out, (folder / "server.err").open("w") as err:
        server = subprocess.Popen(
            [ROOT / "launch" / "serve.sh", *arguments], cwd=ROOT, stdout=out, stderr=err, start_new_session=True
        )
    try:
        while "listening at " not in (printed := (folder / "server.out").read_text(encoding="utf-8")):
            if server.poll() is not None:
                raise RuntimeError(f"the server exited: {(folder / 'server.err').read_text(encoding='utf-8')[-2000:]}")
            time.sleep(0.2)
        yield printed.split("listening at ")[1].split()[0]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


if __name__ == "__main__":
    main()
