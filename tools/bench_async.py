"""Measure updates per hour with sampling during training, next to synchronous steps with the same engine server.

    python tools/bench_async.py [--rounds 3] [--json]

Both sides train the model of tools/bench_partial.py on one rank, with one engine server that serves them in turn.
Rewards are shuffled and the learning rate is tiny, so that lengths do not change. The sides make their steps
alternately, each in its own run folder that is continued in every round. The first steps of each round are not counted:
the buffer of a continued run holds little. What it holds at the first and the last counted step is in the output: if it
shrank, the rate is too high. `measured` is the updates per hour with sampling during training, `reference` those
without.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.step_sides.model_folder import make_model  # noqa: E402
from tools.step_sides.two_mean_lengths import (  # noqa: E402
    GROUP,
    MAX_TOKENS,
    PER_STEP,
    SHAPE,
    SHORT_MEAN,
    give_two_mean_lengths,
    write_prompts,
)

TARGET = 1.5
WARM_STEPS = 5  # of each round
CORRECTION = "algorithm.correction=token_truncated"
ASYNCHRONOUS = ("train.max_staleness=2",)
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


@dataclass(frozen=True)
class CountedSteps:
    """Lines of metrics.jsonl of the counted steps of one side."""

    lines: Sequence[dict[str, Any]]

    @property
    def updates_per_hour(self) -> float:
        """Updates per hour; a step makes one."""
        return 3600.0 * len(self.lines) / float(sum(line["time/step_seconds"] for line in self.lines))

    @property
    def tokens_per_second(self) -> float:
        """Trained tokens per second of the steps."""
        seconds = sum(line["time/step_seconds"] for line in self.lines)
        return float(sum(line["train/num_loss_tokens"] for line in self.lines) / seconds)

    def as_json(self) -> dict[str, Any]:
        """Return rates, and the mean of each metric that the side has."""
        means = {name: statistics.mean(line[name] for line in self.lines) for name in MEANS if name in self.lines[0]}
        rates = {"updates_per_hour": self.updates_per_hour, "tokens_per_second": self.tokens_per_second}
        groups = [line["rollout/carried_groups"] for line in self.lines if "rollout/carried_groups" in line]
        held = {"carried_groups_first": groups[0], "carried_groups_last": groups[-1]} if groups else {}
        return {"steps": len(self.lines), **rates, **means, **held}


def main(argv: Sequence[str] | None = None) -> None:
    """Run both sides alternately and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each side (default: 3)")
    parser.add_argument(
        "--steps", type=int, default=13, help=f"steps per round, {WARM_STEPS} not counted (default: 13)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended
    folder = Path(tempfile.mkdtemp(prefix="bench_async_"))
    try:
        make_model(folder / "model", SHAPE, SHORT_MEAN)
        give_two_mean_lengths(folder / "model")
        write_prompts(folder / "prompts.jsonl", 4000)
        with serving(folder) as url:
            for done in range(1, options.rounds + 1):
                for name, more in (("synchronous", ()), ("asynchronous", ASYNCHRONOUS)):
                    _train(folder, name, done * options.steps, (f"engine.urls=['{url}']", *more))
        synchronous, asynchronous = (
            _read(folder / "runs" / name, options.steps) for name in ("synchronous", "asynchronous")
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = {
        "name": "asynchrony",
        "measured": asynchronous.updates_per_hour,
        "reference": synchronous.updates_per_hour,
        "ratio": asynchronous.updates_per_hour / synchronous.updates_per_hour,
        "ratio_tokens_per_second": asynchronous.tokens_per_second / synchronous.tokens_per_second,
        "unit": "updates/hour",
        "target": TARGET,
        "asynchronous": asynchronous.as_json(),
        "synchronous": synchronous.as_json(),
        "conditions": f"{options.rounds} rounds of {options.steps} steps, {PER_STEP} prompts x {GROUP} rollouts, "
        f"{' '.join(ASYNCHRONOUS)}, one server, 1 rank, {platform.processor() or platform.machine()}",
    }
    print(json.dumps(found) if options.json else json.dumps(found, indent=2))


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Run an engine server; yield its address."""
    with (folder / "server.out").open("w") as out, (folder / "server.err").open("w") as err:
        server = subprocess.Popen(
            [ROOT / "launch" / "serve.sh", *_arguments(folder)],
            cwd=ROOT,
            stdout=out,
            stderr=err,
            start_new_session=True,
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


def _arguments(folder: Path) -> list[str]:
    return [
        "configs/quickstart.yaml",
        "run.world_size=1",
        "model.base=null",
        f"model.path={folder / 'model'}",
        f"data.train={folder / 'prompts.jsonl'}",
        "data.eval=null",
        f"data.prompts_per_step={PER_STEP}",
        f"sampling.group_size={GROUP}",
        f"sampling.max_tokens={MAX_TOKENS}",
        "reward.terms=[{name: length, args: {limit: 60, buffer: 60, kind: target}}]",
        "reward.shuffle=true",
        "algorithm.kl_coef=0",
        CORRECTION,
        "train.minibatches_per_epoch=1",
        "optimizer.lr=1.0e-9",
        "optimizer.min_lr=0",
        "checkpoint.every=1000",
        "observe.trackers=[]",
    ]


def _train(folder: Path, name: str, steps: int, more: Sequence[str]) -> None:
    run = [f"run.dir={folder / 'runs' / name}", f"train.steps={steps}", "engine.placement=server", *more]
    done = subprocess.run(
        [ROOT / "launch" / "train.sh", *_arguments(folder), *run], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"the {name} run failed:\n{done.stdout[-500:]}{done.stderr[-2000:]}")


def _read(run: Path, steps_per_round: int) -> CountedSteps:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return CountedSteps([line for line in lines if (line["step"] - 1) % steps_per_round >= WARM_STEPS])


if __name__ == "__main__":
    main()
